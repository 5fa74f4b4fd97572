"""What is particular to trainings on a GPU: its own random numbers, and kernels that draw inside."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import RecordingError, ReplayError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Module(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        sequences, labels = batch
        return functional.cross_entropy(self.network(sequences), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


class Attention(nn.Module):
    def __init__(self, dropout=0.0, inside=0.0):
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.layer = nn.TransformerEncoderLayer(64, 4, 64, dropout, batch_first=True)
        self.layer.self_attn.dropout = inside
        self.head = nn.Linear(64, 3)

    def forward(self, sequences):
        return self.head(self.layer(self.embed(sequences)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, dropout=0.0, between=0.0):
        super().__init__()
        layers = 2 if dropout else 1
        self.first = nn.LSTM(8, 16, layers, batch_first=True, dropout=dropout)
        self.between = nn.Dropout(between)
        self.second = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, sequences):
        return self.head(self.second(self.between(self.first(sequences)[0]))[0][:, -1])


def data():
    stream = torch.Generator().manual_seed(0)
    sequences = torch.randn(32, 16, 8, generator=stream)
    return TensorDataset(sequences, sequences.mean((1, 2)).gt(0).long())


def record(make, directory, accelerator="gpu", precision="32-true"):
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_epochs=2,
        callbacks=[TrajectoryRecorder(directory)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(make()), DataLoader(data(), batch_size=8, shuffle=True))


def responses(make, directory, **arguments):
    queries = torch.utils.data.Subset(data(), range(2))
    return attribute(
        Ensemble.open(directory), Module(make()), data(), queries=queries, progress=False, **arguments
    ).responses.double()


KINDS = {
    "attention": lambda: Attention(dropout=0.2),
    "recurrent": lambda: Recurrent(between=0.2),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_single_and_double_precision_agree(make, tmp_path):
    record(make, tmp_path)
    single = responses(make, tmp_path, device="cuda")
    double = responses(make, tmp_path, device="cuda", estimator=UnrolledDifferentiation(precision="float64"))
    assert double.abs().max() > 0
    assert (single - double).norm() < 1e-3 * double.norm()


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_mixed_precision_is_replayed(make, tmp_path):
    record(make, tmp_path, precision="bf16-mixed")
    mixed = responses(make, tmp_path, device="cuda")
    double = responses(
        make, tmp_path, device="cuda", estimator=UnrolledDifferentiation(precision="float64", tolerance=0.5)
    )
    assert (mixed - double).norm() < 0.1 * double.norm()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_attention_that_drops_out_inside_a_kernel_is_refused_and_each_remedy_works(tmp_path, precision):
    def make():
        return Attention(inside=0.2)

    with pytest.raises(RecordingError, match="attention layers apply dropout inside a fused kernel"):
        record(make, tmp_path / "fused", precision=precision)
    with sdpa_kernel(SDPBackend.MATH):
        record(make, tmp_path / "math", precision=precision)
    assert responses(make, tmp_path / "math", device="cuda").abs().max() > 0
    record(Attention, tmp_path / "without", precision=precision)
    assert responses(Attention, tmp_path / "without", device="cuda").abs().max() > 0


def test_recurrent_layers_that_drop_out_inside_cudnn_are_refused_and_each_remedy_works(tmp_path, monkeypatch):
    def make():
        return Recurrent(dropout=0.2)

    with pytest.raises(RecordingError, match="applies dropout inside cuDNN"):
        record(make, tmp_path / "cudnn")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "enabled", False)
        record(make, tmp_path / "native")
    single = responses(make, tmp_path / "native", device="cuda")
    double = responses(make, tmp_path / "native", device="cuda", estimator=UnrolledDifferentiation(precision="float64"))
    assert (single - double).norm() < 1e-3 * double.norm()
    record(KINDS["recurrent"], tmp_path / "between")
    assert responses(KINDS["recurrent"], tmp_path / "between", device="cuda").abs().max() > 0


@pytest.mark.parametrize(("trained", "replayed"), [("gpu", "cpu"), ("cpu", "cuda")])
def test_another_device_is_refused_where_random_numbers_were_drawn_and_used_where_not(trained, replayed, tmp_path):
    other = {"cpu": "cuda", "cuda": "cpu"}[replayed]
    record(KINDS["attention"], tmp_path / "drawn", trained)
    with pytest.raises(ReplayError, match=f'device="{other}"'):
        responses(KINDS["attention"], tmp_path / "drawn", device=replayed)
    assert responses(KINDS["attention"], tmp_path / "drawn", device=other).abs().max() > 0
    record(Attention, tmp_path / "not", trained)
    here, there = (responses(Attention, tmp_path / "not", device=device) for device in (replayed, other))
    assert (here - there).norm() < 1e-3 * there.norm()
