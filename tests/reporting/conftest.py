"""One attribution whose influences stand out differently on each query."""

import socket

import pytest
import torch
import wandb

from lightning_dtda.attribution.attribution import Attribution

RUNS, QUERIES, EXAMPLES = 12, (4, 7, 9), 40


def make_attribution(runs=RUNS, **about):
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(runs, 3, generator=generator)
    responses = 0.002 * torch.randn(runs, 3, EXAMPLES, generator=generator)
    responses[..., 11] += torch.tensor([0.3, -0.2, 0.1])  # moves the mean
    responses[..., 23] += 0.4 * (seed - seed.mean(0))  # moves with the seed: the variance
    responses[..., 5] = 0.0  # never trained on
    names = tuple(f"seed-{number:04d}" for number in range(runs))
    settings = {
        "measurement": "loss",
        "estimator": {"class": "lightning_dtda.estimators.unrolled.UnrolledDifferentiation", "precision": "float64"},
        "removal": "reweight",
        "ensemble": "concrete",
        "adjoint_norms": {name: {"9": 1.0, "4": 0.5 + 0.1 * n, "0": 2.0} for n, name in enumerate(names)},
        "diagnosis": {name: {"finite_differences": 2e-5, "precision": 1e-6 * n} for n, name in enumerate(names)},
        "drift": {name: {"parameters": 1e-7 * (n + 1), "gradients": 2e-6} for n, name in enumerate(names)},
    }
    return Attribution(1.0 + 0.5 * seed, responses, names, QUERIES, settings | about)


@pytest.fixture
def attribution():
    return make_attribution()


GROUPS = tuple(f"<i>source {number}</i>" for number in range(EXAMPLES))


@pytest.fixture
def grouped():
    """The same numbers, as the responses to groups of 1, 2, 3, 1, 2, 3 ... examples; names that are no markup."""
    groups = [{"name": name, "examples": list(range(1 + n % 3))} for n, name in enumerate(GROUPS)]
    return make_attribution(removals=groups, step=40)


HERE = ("127.0.0.1", "::1", "localhost")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Keep W&B in a temporary directory, and fail on any name look-up or connection beyond this machine."""
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        assert self.family == socket.AF_UNIX or address[0] in HERE, f"connects to {address}"
        return connect(self, address)

    def local_look_up(host, *arguments, **keywords):
        assert host in HERE, f"looks up {host}"
        return look_up(host, *arguments, **keywords)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_look_up)
    wandb.teardown()  # W&B reads the environment once in a process
    yield
    wandb.teardown()


@pytest.fixture
def saved(attribution, tmp_path):
    attribution.save(tmp_path / "attribution")
    return tmp_path / "attribution"
