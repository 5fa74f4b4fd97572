"""In two processes, each with its own queries, metrics are those of all queries."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from lightning_dtda.evaluation import LinearDatamodelingScore, MislabelDetection
from lightning_dtda.evaluation.functional import linear_datamodeling_score, mislabel_detection
from tests.simulated import experiment

SHARES = (slice(0, 2), slice(2, 5))  # unequal, as the last batch of an epoch may be


def suspicions():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, generator=generator), torch.tensor([True, False, False, True, False])


def compute(rank, store, results):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    predicted, baseline, real, real_baseline = experiment(torch.Generator().manual_seed(0))[0]
    own = SHARES[rank]
    score, detection = LinearDatamodelingScore("variance", replicates=20), MislabelDetection()
    score.update(predicted[..., own], baseline[:, own], real[..., own], real_baseline[:, own])
    suspicion, wrong = suspicions()
    detection.update(suspicion[own], wrong[own])
    torch.save((score.compute(), detection.compute()), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    torch.multiprocessing.spawn(compute, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    expected = (
        linear_datamodeling_score(*experiment(torch.Generator().manual_seed(0))[0], "variance", replicates=20),
        mislabel_detection(*suspicions()),
    )
    for rank in range(2):
        for found, alone in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            for name, value in alone.items():
                assert torch.equal(found[name], value), name
