# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which training images move a prediction?
#
# A small convolutional network learns to read handwritten digits. Its answer to a new image comes from the images that
# it was trained on, but from which? And would other seeds have given the same answer? Here we train it twenty-four
# times, and ask.
#
# About a minute on two cores; the data come with scikit-learn.

# %%
import lightning.pytorch as pl
import torch
from plotly.subplots import make_subplots
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, plot, record

# %% [markdown]
# ## An ordinary module
#
# Nothing here knows of attribution. 400 images of 8 by 8 pixels are for training, 100 others for questions.

# %%
digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.as_tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
training_set, validation_set = (TensorDataset(images[part], labels[part]) for part in (order[:400], order[400:500]))


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(training_set, batch_size=32, shuffle=True)


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def make_trainer():
    return pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# %% [markdown]
# ## Record twenty-four seeds
#
# A recorder, which is a callback, notes what happened in each step. `record` trains one seed after the other, or many
# small networks at once, with `stacked="auto"`.

# %%
record(
    lambda: (make_trainer(), Reader(), Data()), TrajectoryRecorder("runs/digits"), 24, stacked="auto", progress=False
)
ensemble = Ensemble.open("runs/digits")
print(ensemble)

# %% [markdown]
# ## Which images are uncertain?
#
# The *margin* is the log-odds of the right answer: above zero, the network reads the digit correctly. For 12 images we
# measure it in each of the 24 networks, and compute at once how it would change if any of the 400 training images were
# removed. The measured margins are the attribution's *baseline*.

# %%
queries = torch.utils.data.Subset(validation_set, range(12))
attribution = attribute(ensemble, Reader(), Data(), queries=queries, measurement="margin", progress=False)
plot.baseline(attribution).show()

# %% [markdown]
# Each box is one image, each point one network. Most margins are far above zero whatever the seed. We ask about the
# image with the lowest one on average.

# %%
asked = int(attribution.baseline.mean(0).argmin())
margins = attribution.baseline[:, asked]
print(f"image {asked}: read correctly by {int((margins > 0).sum())} of {len(margins)} networks")


def show(row):
    """Draw images in a row, each with a title."""
    figure = make_subplots(1, 6, subplot_titles=[title for _, title in row])
    for place, (image, _) in enumerate(row, 1):
        figure.add_heatmap(z=image[0].flip(0).tolist(), colorscale="Greys", showscale=False, row=1, col=place)
    figure.update_xaxes(visible=False).update_yaxes(visible=False).update_annotations(font_size=13)
    figure.update_layout(
        width=760, height=170, margin={"t": 40, "b": 10, "l": 10, "r": 10}, plot_bgcolor="white"
    ).show()


image, label = queries[asked]
show([(image, f"a {label}")])

# %% [markdown]
# ## Which training images move it?
#
# An influence is a *change when the example is removed*. Where it is below zero, the margin would be lower without the
# training image: the image helps to read this digit. Above zero, the margin would be higher: the image hurts. The
# numbers are predicted changes of the mean margin without that one image. First six that help:

# %%
mean = attribution.influence("mean")[asked]
helping, hurting = mean.argsort()[:6].tolist(), mean.argsort(descending=True)[:6].tolist()


def described(k):
    image, label = training_set[k]
    return image, f"a {label}: {mean[k]:+.2f}"


show([described(k) for k in helping])

# %% [markdown]
# And six that hurt:

# %%
show([described(k) for k in hurting])

# %% [markdown]
# The question is a 1 with a slant and a foot. Most that help are ones with a foot, too. The two that hurt most are also
# ones, but plain strokes: a right label does not make an example helpful to every image of its class.
#
# ## How sure is that?
#
# Twenty-four networks are a sample. The bars show each influence with its interval over seeds; blue ones are
# significant among all 400: on average, at most one in twenty of them is there by chance. The others are not shown to
# matter.

# %%
plot.top(attribution, asked, "mean").show()

# %% [markdown]
# And what would happen if we left out the six images that help, all together? Each line is one network, as trained and
# as predicted.

# %%
plot.without(attribution, asked, helping).show()

# %% [markdown]
# Predictions are first-order: they follow the derivative of the training, and large changes bend away from it.
#
# ## What to do next
#
# - Ask whether an effect is real, and how many runs it takes to know: [Is it real?](is_it_real.py)
# - Leave images out and see what really happens: [Act on it](act_on_it.py).
# - Do this for [your own module](your_own_module.py); the callback works with any training script.
