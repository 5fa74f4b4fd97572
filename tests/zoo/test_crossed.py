"""Seeds of initialisation, order and noise can be set apart for every case, and the variance split by them."""

import pytest
import torch
from torch.utils.data import Subset

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, record
from lightning_dtda.recording import CrossedSeeds
from lightning_dtda.recording.crossed_runs import CrossedRuns
from lightning_dtda.recording.seeds import record_seeds
from lightning_dtda.trajectory.traces import agree, traces_of
from tests.zoo.cases import CASES, RANDOM_ITEMS, REFUSED

ONE_AT_A_TIME = {"initialisation": 1, "order": 1000, "noise": 1000000}
"""Runs that differ from run 0 in the seed of one source."""

SPLIT = ("weighted_cnn", "packed_lstm", "diffusion", "bert_lora", "gcn", "timm_resnet")


def made(case, root):
    """Return what `record` needs; nothing is seeded here."""

    def make():
        return case.trainer(), *getattr(case._file, case.name)()

    return make, TrajectoryRecorder(root, batches="store" if case.name in RANDOM_ITEMS else "indices")


@pytest.mark.slow
def test_each_source_changes_what_it_decides_and_nothing_else(case, tmp_path):
    if case.name in REFUSED:
        pytest.skip("refused, with the reason: see the test of that")
    make, recorder = made(case, tmp_path)
    varied = {source: 2 for source in ONE_AT_A_TIME if source != "noise" or case.random}
    runs = [0, *(ONE_AT_A_TIME[source] for source in varied)]
    seeds = CrossedSeeds(**varied)
    assert record_seeds(make, recorder, runs, crossed=seeds) == {}
    checks = CrossedRuns(tmp_path, seeds)
    for seed in runs:
        checks.add(seed)
    first, *others = map(traces_of, Ensemble.open(tmp_path))
    for source, traces in zip(varied, others, strict=True):
        for other in varied:
            # examples in another order have nothing in common with those before
            assert agree(first[other], traces[other]) in ([False] if other == source else [True, None]), (source, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_the_variance_is_split(name, tmp_path):
    case = CASES[name]
    case.skip_unless_installed()
    make, recorder = made(case, tmp_path)
    assert record(make, recorder, CrossedSeeds(initialisation=3, order=2, noise=2), progress=False) == {}
    _, module, data = make()
    queries = Subset(case.queries(), range(2))
    found = attribute(Ensemble.open(tmp_path), module, data, queries=queries, progress=False)
    assert max(drift["parameters"] for drift in found.about["drift"].values()) < 1e-4
    split = found.variance_by_source()
    torch.testing.assert_close(split.share.sum(0), torch.ones(2, dtype=torch.float64))
    assert split.variance.isfinite().all()
    assert found.influence("noise_variance").isfinite().all()
