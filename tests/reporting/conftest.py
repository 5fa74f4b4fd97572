"""Attributions that are shown, and a machine without a network."""

import socket

import pytest
import wandb

from tests.reporting.attributions import GROUPS, make_attribution


@pytest.fixture
def attribution():
    return make_attribution()


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
