"""What stacked trainings have to follow, and what they have to refuse: modules, data and a callback."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from tests.retraining.tasks import Data, Regressor

SETTINGS = [
    {"gradient_clip_val": 0.3},
    {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    {"accumulate_grad_batches": 3},
    {"limit_train_batches": 2},
]
"""Arguments of the Trainer that change what a step is."""


class Clocked(Regressor):
    """Its loss depends on the epoch and on the number of the batch, which a trace would make constants."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch + 0.5 * (batch_idx % 2))


class Partly(Regressor):
    """Has a frozen layer and a buffer, both drawn anew for every seed."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)
        self.register_buffer("offset", torch.rand(1, dtype=torch.float64))

    def forward(self, inputs):
        return super().forward(inputs) + self.offset

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Validating(Data):
    """Draws numbers for a validation loader between the epochs."""

    def val_dataloader(self):
        return DataLoader(self.train, 5, shuffle=True)


class Single(Regressor):
    """Made in single precision, which the Trainer casts: its parameters, and a buffer."""

    def __init__(self):
        super().__init__()
        self.net.float()
        self.register_buffer("offset", torch.rand(1))

    def forward(self, inputs):
        return super().forward(inputs) + self.offset


class Dropping(Regressor):
    def forward(self, inputs):
        return super().forward(torch.nn.functional.dropout(inputs, 0.2, self.training))


class Plateau(Regressor):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss"}}


class Lucky(Regressor):
    """Its learning rate depends on the seed."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1 + 0.01 * float(self.net[2].bias.detach()))


class Branching(Regressor):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (2 if loss.item() > 1 else 1)


class Reset(Regressor):
    def on_train_start(self):
        torch.nn.init.constant_(self.net[0].bias, 0.1)


class Counting(Regressor):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen = self.seen + 1
        return super().training_step(batch, batch_idx)


class Noise(pl.Callback):
    """Changes the parameters after every step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.net[0].weight.mul_(0.9)


class Normalised(Regressor):
    def __init__(self):
        super().__init__()
        self.net.insert(1, torch.nn.BatchNorm1d(5).double())
