"""Small trainings as they are recorded, and what is asked of them: random numbers, clipping, an average, two groups."""

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.estimators import GaussNewton

EXAMPLES = 12


class Net(pl.LightningModule):
    """A regression with dropout, trained by Adam in two groups."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 4),
            torch.nn.BatchNorm1d(4),
            torch.nn.Dropout(0.3),
            torch.nn.Tanh(),
            torch.nn.Linear(4, 1),
        )

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs)[:, 0], targets)

    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters()},
            {"params": [*self.net[1].parameters(), *self.net[4].parameters()]},
        ]
        return torch.optim.Adam(groups, lr=0.01)


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(EXAMPLES, 2, generator=generator), torch.randn(EXAMPLES, generator=generator))
    return DataLoader(data, batch_size=5, shuffle=True)


def record(root, batches="indices", averaged=False, gradients="auto"):
    """Record two seeds."""
    for seed in range(2):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_epochs=3,
            gradient_clip_val=0.5,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                *([callbacks.EMAWeightAveraging(decay=0.7)] if averaged else []),
                TrajectoryRecorder(root, batches=batches, gradients=gradients, checkpoint_every=3),
            ],
        )
        trainer.fit(Net(), loader())


ESTIMATORS = UnrolledDifferentiation(), InfluenceFunctions(curvature=GaussNewton(damping=0.1))


def ask(root, estimators=ESTIMATORS):
    """Attribute the runs."""
    ensemble = Ensemble.open(root)
    data = loader()
    queries = torch.utils.data.Subset(data.dataset, [0, 1])
    for estimator in estimators:
        attribution = attribute(ensemble, Net(), data, queries=queries, estimator=estimator, progress=False)
        attribution.influence("mean")
