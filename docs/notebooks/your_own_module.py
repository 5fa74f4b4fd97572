# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does it work with my module?
#
# Very likely. A training step is replayed as it happened: with the batch that your `collate_fn` made and the random
# numbers that it drew. So a module needs no changes, no per-example loss and no special optimizer. Two that are far
# from a tidy classifier: a transformer on padded text, and a diffusion model. Half a minute on two cores.

# %%
import importlib.util

import lightning.pytorch as pl
import torch
from plotly.subplots import make_subplots
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, plot, record
from lightning_dtda.errors import RecordingError


def make_trainer(epochs, callbacks=()):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


# %% [markdown]
# ## A diffusion model
#
# Its loss is random: each step draws noise levels and noise inside of `training_step`. They are drawn again, the same
# ones, when the step is replayed.

# %%
digits = load_digits()
images = torch.as_tensor(digits.data[digits.target < 3], dtype=torch.float32) / 8 - 1
training_set, validation_set = TensorDataset(images[:200]), TensorDataset(images[200:208])


class Denoiser(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(65, 96), nn.SiLU(), nn.Linear(96, 64))

    def training_step(self, batch, batch_idx):
        (clean,) = batch
        level = torch.rand(len(clean), 1, device=self.device)
        noise = torch.randn_like(clean)
        noisy = (1 - level).sqrt() * clean + level.sqrt() * noise
        guessed = self.network(torch.cat([noisy, level], 1))
        return nn.functional.mse_loss(guessed, noise)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class Digits(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(training_set, batch_size=25, shuffle=True)


record(
    lambda: (make_trainer(10), Denoiser(), Digits()),
    TrajectoryRecorder("runs/diffusion"),
    8,
    stacked="auto",
    progress=False,
)

# %% [markdown]
# What is measured is random too. It is averaged over draws, the same ones for every run.

# %%
attribution = attribute(
    Ensemble.open("runs/diffusion"),
    Denoiser(),
    Digits(),
    queries=validation_set,
    measurement="loss",
    measurement_draws=32,
    progress=False,
)
plot.everything(attribution, 0).show()

# %% [markdown]
# Each point is a training image. To the right, the denoising loss on the first query would be higher without it; up and
# down is the change of the loss's spread over seeds. Far to the right is the image that helps most. Beside the query:

# %%
closest = int(attribution.influence("mean")[0].argmax())
figure = make_subplots(1, 2, subplot_titles=["the query", f"training image {closest}"])
for place, (image,) in enumerate((validation_set[0], training_set[closest]), 1):
    figure.add_heatmap(z=image.reshape(8, 8).flip(0).tolist(), colorscale="Greys", showscale=False, row=1, col=place)
figure.update_xaxes(visible=False).update_yaxes(visible=False)
figure.update_layout(width=360, height=210, margin={"t": 40, "b": 10, "l": 10, "r": 10}).show()

# %% [markdown]
# ## A transformer on padded text
#
# Sentences of different length, padded to the longest of their batch by a `collate_fn`; a dictionary for a batch;
# dropout; the loss computed inside of a model of Hugging Face's transformers. The model here is tiny and starts from
# random weights, and the sentences are lists of tokens whose class shows in which are frequent.

# %%
TRANSFORMERS = importlib.util.find_spec("transformers") is not None
generator = torch.Generator().manual_seed(0)


def sentence(label):
    length = int(torch.randint(4, 12, (), generator=generator))
    tokens = 2 + torch.randint(20, (length,), generator=generator) + 15 * label
    return {"input_ids": tokens, "label": label}


class Sentences(torch.utils.data.Dataset):
    def __init__(self, number):
        self.rows = [sentence(n % 2) for n in range(number)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


def collate(rows):
    tokens = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


train_sentences, new_sentences = Sentences(80), Sentences(8)


class Text(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(train_sentences, batch_size=16, shuffle=True, collate_fn=collate)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        self.model = BertForSequenceClassification(config)

    def forward(self, batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# %% [markdown]
# Queries are padded by the `collate_fn` of their own loader.

# %%
if TRANSFORMERS:
    record(lambda: (make_trainer(4), Classifier(), Text()), TrajectoryRecorder("runs/text"), 8, progress=False)
    of_text = attribute(
        Ensemble.open("runs/text"),
        Classifier(),
        Text(),
        queries=DataLoader(new_sentences, collate_fn=collate),
        measurement="margin",
        progress=False,
    )
    plot.top(of_text, 0, "mean").show()
else:
    print("transformers is not installed: this part is left out. pip install transformers")

# %% [markdown]
# Nothing in either module knows that it is attributed.
#
# ## If yours is refused
#
# What cannot be attributed is refused before anything is trained, with the way out in the message. For instance, an
# optimizer that evaluates the loss several times in a step:


# %%
class Refused(Denoiser):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


try:
    pl.seed_everything(0, verbose=False)
    make_trainer(1, [TrajectoryRecorder("runs/refused")]).fit(Refused(), Digits())
except RecordingError as error:
    print(error)

# %% [markdown]
# ## What to do next
#
# - [Which trainings work](../modules.md) lists the modules that are tested and all that is refused.
# - Add `TrajectoryRecorder("runs/mine")` to the callbacks of your script: [record](../record.md).
# - A real fine-tuning of a sentence encoder is in `examples/finetuning`.
