"""Hugging Face's transformers, and adapters by peft, on short token lists padded to the longest of their batch."""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    get_linear_schedule_with_warmup,
)

from tests.zoo.data import QUERIES, Items, generator, loader

VOCABULARY = 60
CLASSES = 3
PADDING = 0


class TextModel(pl.LightningModule):
    """Trains a model of transformers on its own loss, as its documentation does with Lightning."""

    def __init__(self, model: torch.nn.Module, learning_rate: float = 2e-3, weight_decay: float = 0.01):
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        outputs = self(**batch)
        self.log("train_loss", outputs.loss, prog_bar=True)
        return outputs.loss

    def configure_optimizers(self):
        trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        plain = ("bias", "LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
        groups = [
            {
                "params": [weight for name, weight in trained if not name.endswith(plain)],
                "weight_decay": self.hparams.weight_decay,
            },
            {"params": [weight for name, weight in trained if name.endswith(plain)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _padded(items, labels):
    """``input_ids`` and ``attention_mask`` as long as the longest item, as DataCollatorWithPadding makes them."""
    tokens = [torch.tensor(item["input_ids"]) for item in items]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=PADDING),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
        "labels": labels,
    }


def _classify(items):
    return _padded(items, torch.tensor([item["label"] for item in items]))


def _continue(items):
    """Labels are the tokens themselves; -100 where there is none, which the loss leaves out."""
    tokens = [torch.tensor(item["input_ids"]) for item in items]
    return _padded(items, pad_sequence(tokens, batch_first=True, padding_value=-100))


def _reviews(first: int, last: int) -> Items:
    """Token lists of 4 to 14, as a tokenizer returns them; the class shows in which tokens are frequent."""
    stream, items = generator(4), []
    for _ in range(last):
        label = int(torch.randint(CLASSES, (), generator=stream))
        length = int(torch.randint(3, 14, (), generator=stream))
        third = (VOCABULARY - 2) // CLASSES
        tokens = torch.randint(third, (length,), generator=stream) + 2
        moved = torch.rand(length, generator=stream) < 0.6
        items.append({"input_ids": [1, *(tokens + moved * label * third).tolist()], "label": label})
    return Items(items[first:])


def _bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        num_labels=CLASSES,
        pad_token_id=PADDING,
    )
    return BertForSequenceClassification(config)


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=PADDING
    )
    return GPT2LMHeadModel(config)


def bert():
    return TextModel(_bert()), loader(_reviews(0, 40), collate_fn=_classify)


def bert_queries():
    return _reviews(40, 40 + QUERIES)


def gpt2():
    return TextModel(_gpt2()), loader(_reviews(0, 32), collate_fn=_continue)


def gpt2_queries():
    return _reviews(32, 32 + QUERIES)


def bert_lora():
    """Low-rank adapters on queries and values, and a head that is trained whole; all else is frozen."""
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["query", "value"]
    )
    model = TextModel(get_peft_model(_bert(), config), learning_rate=5e-3)
    return model, loader(_reviews(0, 40), collate_fn=_classify)


def bert_lora_queries():
    return _reviews(40, 40 + QUERIES)


def gpt2_lora():
    """Adapters on the attention of a language model, whose layers are transformers' own ``Conv1D``."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    model = TextModel(get_peft_model(_gpt2(), config), learning_rate=5e-3)
    return model, loader(_reviews(0, 32), collate_fn=_continue)


def gpt2_lora_queries():
    return _reviews(32, 32 + QUERIES)
