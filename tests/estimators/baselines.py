"""Classifiers in double precision that the simpler estimators are asked about."""

import torch
from torch.func import functional_call
from torch.utils.data import TensorDataset

from lightning_dtda import attribute
from tests.estimators.small_runs import Classifier as _Classifier

EXAMPLES, QUERIES, STEPS = 15, 3, 9


class Classifier(_Classifier):
    """Three classes; the rate falls from step to step, so that it matters when an example was used."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Weighted(Classifier):
    """With weights of the classes, by whose sum over the batch torch divides."""

    def training_step(self, batch, batch_idx):
        weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], weight=weights)


def classification(examples=EXAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def written_out(run):
    """Margins of the queries and losses of the examples, as plain functions of a run's flat parameters."""
    module, layout = Classifier().eval(), run.layout
    (inputs, labels), (asked, answers) = classification().tensors, classification(QUERIES, seed=1).tensors

    def margins(theta, inputs=asked, labels=answers):
        scores = functional_call(module, layout.unflatten(theta), (inputs,))
        probabilities = scores.softmax(1).gather(1, labels[:, None])[:, 0]
        return probabilities.log() - (1 - probabilities).log()

    def losses(theta):
        scores = functional_call(module, layout.unflatten(theta), (inputs,))
        return torch.nn.functional.cross_entropy(scores, labels, reduction="none")

    return margins, losses


def ask(ensemble, estimator, module=None, **arguments):
    asked = {"measurement": "margin", "progress": False, "queries": classification(QUERIES, seed=1)}
    return attribute(ensemble, module or Classifier(), classification(), estimator=estimator, **(asked | arguments))
