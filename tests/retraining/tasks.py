"""A small training for every engine: its module, data and Trainer, made by functions; and the same by hand."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.regression import weighted_data

EXAMPLES, QUERIES, BATCH, STEPS = 13, 3, 4, 7
TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Regressor(pl.LightningModule):
    """A small smooth network in double precision; SGD with momentum, its learning rate falling at every step."""

    def __init__(self, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        nn = torch.nn
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, inputs):
        return self.net(inputs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = ((self(inputs) - targets) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(**arguments):
    return pl.Trainer(max_steps=STEPS, **TRAINER, **arguments)


def examples():
    inputs, targets, _ = weighted_data(EXAMPLES)
    return TensorDataset(inputs, targets)


def queries():
    inputs, targets, _ = weighted_data(QUERIES, seed=1)
    return TensorDataset(inputs, targets)


def training_loader(**arguments):
    return DataLoader(examples(), **({"batch_size": BATCH, "shuffle": True} | arguments))


def by_hand(seed, removed=(), steps=STEPS):
    """The same training as a plain loop over batches of a data set that never had the removed examples."""
    inputs, targets = (tensor[[n for n in range(EXAMPLES) if n not in removed]] for tensor in examples().tensors)
    pl.seed_everything(seed, verbose=False)
    module = Regressor()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    batches = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True)
    step = 0
    while step < steps:
        for x, y in batches:
            if step == steps:
                break
            optimizer.param_groups[0]["lr"] = 0.1 * 0.95**step
            optimizer.zero_grad()
            ((module.net(x)[:, 0] - y) ** 2).mean().backward()
            optimizer.step()
            step += 1
    inputs, targets = queries().tensors
    with torch.no_grad():
        return (module.net(inputs)[:, 0] - targets) ** 2


class Data(pl.LightningDataModule):
    """A data module with a random data set unless a seed is given; the validation set is used during training."""

    def __init__(self, split_seed=0):
        super().__init__()
        self.split_seed = split_seed

    def setup(self, stage):
        generator = None if self.split_seed is None else torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(13, generator=generator)
        self.train = TensorDataset(*(tensor[order] for tensor in examples().tensors))

    def train_dataloader(self):
        return DataLoader(self.train, BATCH, shuffle=True)
