"""A replay may differ from its record by rounding, also where an optimizer makes steps of it; by a label it may not."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.errors import ReplayError
from lightning_dtda.replay import Replay, training_examples


class Attention(pl.LightningModule):
    """A transformer: a bias of its keys has no gradient but rounding, which Adam turns into steps."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.outputs = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.outputs(self.encoder(self.embed(batch[0])).mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 8, 4, generator=generator), torch.randint(3, (64,), generator=generator))
    root = tmp_path_factory.mktemp("runs")
    pl.seed_everything(0, verbose=False)
    recorder = TrajectoryRecorder(root, gradients="none")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=20, accelerator="cpu", callbacks=[recorder], enable_model_summary=False, **quiet)
    trainer.fit(Attention(), DataLoader(data, 16, shuffle=True))
    return Ensemble.open(root)[0], data


def replayed(run, data, precision):
    """Replay all stretches of a run; returns the replay."""
    examples = training_examples(data)
    # what is shown here is what the comparison of parameters finds by itself
    examples.refuse_changes = lambda run: None
    replay = Replay([run], Attention(), examples, precision=precision)
    for stretch in replay.stretches:
        for _ in replay.backwards(*stretch):
            pass
    return replay


@pytest.mark.parametrize("precision", ["recorded", "float64"])
def test_steps_that_rounding_makes_are_no_change_of_the_data(trained, precision):
    (drift,) = replayed(*trained, precision).drift
    assert drift.parameters < 1e-4


@pytest.mark.parametrize("precision", ["recorded", "float64"])
@pytest.mark.parametrize("example", [0, 21, 63])
def test_one_changed_label_is_found(trained, precision, example):
    run, data = trained
    labels = data.tensors[1].clone()
    labels[example] = (labels[example] + 1) % 3
    with pytest.raises(ReplayError, match="is not reproduced between step 0 and step"):
        replayed(run, TensorDataset(data.tensors[0], labels), precision)


def test_the_largest_difference_alone_would_have_been_a_false_alarm(trained):
    run, data = trained
    theta = replayed(run, data, "float64")
    first, last = theta.stretches[-1]
    ends, _ = theta.retrain(torch.ones(1, len(data), dtype=torch.float64), first, last, averaged=False)
    recorded, start = (theta.checkpoint(step)[0] for step in (last, first))
    assert (ends - recorded).abs().max() > 1e-3 * (recorded - start).abs().max()
