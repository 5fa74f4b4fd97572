# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Act on it
#
# Which training images should we leave out so that the model gets better, and does it then? We put 40 wrong labels
# among 400 handwritten digits, let `suggest_removals` choose, and retrain with fresh seeds to see what really happens.
# A minute on two cores.

# %%
import lightning.pytorch as pl
import torch
from plotly import graph_objects as go
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, plot, record, retrain, suggest_removals
from lightning_dtda.evaluation import verify

digits = load_digits()
images = torch.as_tensor(digits.data, dtype=torch.float32) / 16
labels = torch.as_tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
training, validation, unseen = order[:400], order[400:450], order[450:850]

given = labels[training].clone()
given[:40] = (given[:40] + torch.randint(1, 10, (40,), generator=torch.Generator().manual_seed(1))) % 10
training_set = TensorDataset(images[training], given)
validation_set = TensorDataset(images[validation], labels[validation])
unseen_set = TensorDataset(images[unseen], labels[unseen])


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(training_set, batch_size=32, shuffle=True)


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_trainer():
    return pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


record(
    lambda: (make_trainer(), Reader(), Data()), TrajectoryRecorder("runs/digits"), 24, stacked="auto", progress=False
)
ensemble = Ensemble.open("runs/digits")
attribution = attribute(ensemble, Reader(), Data(), queries=validation_set, progress=False)

# %% [markdown]
# ## Ask for a suggestion
#
# The goal is a lower loss on 50 validation images. Half of the runs choose removals one by one; the others, which had
# no say, tell what they do.

# %%
suggestion = suggest_removals(attribution, goal="improve_mean", k=40)
print(suggestion.verdict)

# %%
wrong = [k for k in suggestion.removed if k < 40]
print(f"{len(wrong)} of the {len(suggestion.removed)} images to remove have a wrong label; a tenth would by chance")

# %% [markdown]
# The predicted effect of the first removal, the first two, and so on. The band holds for all of them at once.

# %%
table = suggestion.to_dataframe()
figure = go.Figure(layout={"template": "plotly_white", "height": 380, "showlegend": False, "margin": {"t": 20}})
figure.add_scatter(x=table.examples, y=table.upper, mode="lines", line={"width": 0})
figure.add_scatter(
    x=table.examples,
    y=table.lower,
    mode="lines",
    line={"width": 0},
    fill="tonexty",
    fillcolor="rgba(0, 114, 178, 0.2)",
)
figure.add_scatter(x=table.examples, y=table.effect, mode="lines", line={"color": "#0072B2"})
figure.update_xaxes(title_text="images removed").update_yaxes(title_text="predicted change of the mean loss")
figure.show()

# %% [markdown]
# ## Verify it
#
# A prediction for so large a removal is a first guess. Train without these images, and with all, on 48 fresh seeds.

# %%
settings = {"trainer": make_trainer, "seeds": 48, "ensemble": ensemble, "progress": False}
truth = retrain(Reader, Data(), subsets=[sorted(suggestion.removed)], queries=validation_set, **settings)
found = verify(suggestion, truth)
print(f"validation loss {found.before:.3f}, really changed by {found.effect:.3f} [{found.low:.3f}, {found.high:.3f}]")

# %% [markdown]
# The validation images were used to choose. What counts is the loss on images that played no part: 400 others.

# %%
fresh = retrain(Reader, Data(), subsets=[sorted(suggestion.removed)], queries=unseen_set, **settings)
before, after = fresh.baseline.mean(1), fresh.measurements[0].mean(1)
change = after - before
half = 2.01 * change.std() / len(change) ** 0.5  # Student's t with 47 degrees of freedom
print(f"loss on unseen images: {before.mean():.3f} before, {after.mean():.3f} after,")
print(f"change {change.mean():.3f} [{change.mean() - half:.3f}, {change.mean() + half:.3f}]")

# %%
figure = go.Figure(
    layout={"template": "plotly_white", "height": 420, "showlegend": False, "margin": {"t": 20, "r": 90}}
)
for pair in zip(before.tolist(), after.tolist(), strict=True):
    figure.add_scatter(
        x=["all images", "without the suggested ones"], y=pair, mode="lines", line={"color": "#A6ADB8", "width": 1}
    )
for name, values, colour in (
    ("all images", before, "#D55E00"),
    ("without the suggested ones", after, "#0072B2"),
):
    figure.add_scatter(x=[name] * len(values), y=values.tolist(), mode="markers", marker={"color": colour, "size": 7})
figure.update_yaxes(title_text="mean loss on unseen images", rangemode="tozero")
figure.show()

# %% [markdown]
# Each line is one seed, before and after. For most seeds the loss falls; for a few it rises: the effect is one of the
# distribution, not of every model.
#
# ## And the dependence on the seed?
#
# The same with another goal: that the loss varies less from seed to seed.

# %%
print(suggest_removals(attribution, goal="reduce_variance", k=40).verdict)
asked = int(attribution.baseline.std(0).argmax())
plot.without(attribution, asked, list(suggestion.removed)).show()

# %% [markdown]
# The picture shows the image whose loss depends most on the seed, in all runs, as trained and as predicted without the
# images suggested for the *mean*. A verdict about the variance is harder to get: it takes more runs, and there may be
# nothing to gain. "No removal is shown to help" is an answer too.
#
# ## What to do next
#
# - [Act: remove and verify](../act.md) has all goals and the commands.
# - Before you rely on a prediction: [is it real?](is_it_real.py)
