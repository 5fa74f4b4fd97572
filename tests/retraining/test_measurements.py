"""What is measured of retrained models is what attribution measures of recorded ones."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, retrain
from tests.retraining.tasks import Regressor, make_trainer, queries, training_loader

SEEDS = [3, 4]


class Clocked(Regressor):
    """Its loss depends on the epoch and the step."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch + 0.01 * self.global_step)


def squared_prediction(module, batch):
    return module(batch[0]) ** 2


def noisy_prediction(module, batch):
    return module(batch[0] + 0.1 * torch.randn_like(batch[0]))


def branching_prediction(module, batch):
    prediction = module(batch[0])
    return 2 * prediction if prediction.item() > 0 else prediction


@pytest.mark.parametrize("measurement", ["loss", squared_prediction, noisy_prediction, branching_prediction])
def test_all_engines_measure_what_attribution_measures(tmp_path, measurement):
    for seed in SEEDS:
        pl.seed_everything(seed, verbose=False)
        make_trainer(callbacks=[TrajectoryRecorder(tmp_path)]).fit(Clocked(), training_loader())
    ensemble = Ensemble.open(tmp_path)
    question = {"queries": queries(), "measurement": measurement, "measurement_draws": 3, "measurement_seed": 5}
    baseline = attribute(ensemble, Clocked(), training_loader(), **question, progress=False).baseline
    shared = {"subsets": [[0]], "seeds": SEEDS, "progress": False} | question
    truths = [
        retrain(Clocked(), training_loader(), trainer=make_trainer, stacked=stacked, **shared)
        for stacked in (False, True)
    ]
    truths.append(retrain(Clocked(), training_loader(), removal="reweight", ensemble=ensemble, **shared))
    for truth in truths:
        # double precision: rounding of seven steps
        torch.testing.assert_close(truth.baseline, baseline, rtol=1e-10, atol=1e-12)
