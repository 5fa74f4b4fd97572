"""BatchNorm by its definition against torch's own, and the statistics that it leaves behind."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.batch_norm import batch_norm_by_definition, running_statistics
from tests.regression import CoupledRegressor, loader, weighted_data

LAYERS = {
    "1d": (nn.BatchNorm1d(4), (6, 4)),
    "1d over time": (nn.BatchNorm1d(4, momentum=0.5, eps=1e-2), (6, 4, 3)),
    "2d": (nn.BatchNorm2d(3), (5, 3, 2, 2)),
    "3d without weights": (nn.BatchNorm3d(2, affine=False), (5, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_outputs_and_statistics_are_those_of_torch(layer, shape, training):
    layer = layer.double().train(training)
    layer.running_mean.normal_()
    inputs = torch.randn(shape, dtype=torch.float64)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    watched = {id(getattr(layer, name)): name for name in ("running_mean", "running_var")}
    with batch_norm_by_definition(watched) as updated:
        found = layer(inputs)
    assert torch.equal(layer.running_mean, before["running_mean"])  # nothing in place
    expected = layer(inputs)
    torch.testing.assert_close(found, expected)
    for name, statistic in updated.items():
        torch.testing.assert_close(statistic, getattr(layer, name))
    assert sorted(updated) == (["running_mean", "running_var"] if training else [])


def test_the_function_is_torchs_own_afterwards():
    before = functional.batch_norm
    with pytest.raises(RuntimeError), batch_norm_by_definition({}):
        raise RuntimeError
    assert functional.batch_norm is before


def test_statistics_of_frozen_layers_are_no_state():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False))
    assert running_statistics(module) == ["0.running_mean", "0.running_var"]


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def make():
    return CoupledRegressor(lambda m: torch.optim.SGD(m.parameters(), 0.1), dtype=torch.float32, network=network)


def test_runs_together_give_what_runs_alone_give(fit, tmp_path):
    data = TensorDataset(*weighted_data(dtype=torch.float32))
    for seed in range(3):
        torch.manual_seed(seed)
        fit(make(), loader(*data.tensors), TrajectoryRecorder(tmp_path, f"run-{seed}"), max_epochs=3)

    def ask(runs_per_batch):
        estimator = UnrolledDifferentiation(runs_per_batch=runs_per_batch)
        return attribute(Ensemble.open(tmp_path), make(), data, queries=data, estimator=estimator, progress=False)

    torch.testing.assert_close(ask(3).responses, ask(1).responses, rtol=1e-3, atol=1e-5)


def test_runs_whose_batches_differ_in_size_are_not_swept_together(fit, tmp_path):
    data = TensorDataset(*weighted_data(dtype=torch.float32))
    for run, sizes in (("a", [[0, 1, 2], [3, 4, 5, 6]]), ("b", [[0, 1, 2, 3], [4, 5, 6]])):
        batches = torch.utils.data.DataLoader(data, batch_sampler=sizes)
        fit(make(), batches, TrajectoryRecorder(tmp_path, run), max_epochs=2)
    ensemble = Ensemble.open(tmp_path)
    with pytest.raises(ReplayError, match="runs_per_batch=1"):
        attribute(
            ensemble,
            make(),
            data,
            queries=data,
            estimator=UnrolledDifferentiation(runs_per_batch=2),
            progress=False,
        )
    alone = UnrolledDifferentiation(runs_per_batch=1)
    assert attribute(ensemble, make(), data, queries=data, estimator=alone, progress=False).responses.isfinite().all()
