"""TracIn, against its sum written out and against unrolled differentiation."""

import lightning.pytorch as pl
import pytest
import torch
from torch.func import jacrev
from torch.utils.data import DataLoader

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import TracIn
from tests.estimators.baselines import EXAMPLES, QUERIES, STEPS, Classifier, ask, classification, written_out


class Linear(Classifier):
    """A loss that is linear in the parameters, whose Hessian is zero; the bias learns faster than the weights."""

    def __init__(self, maximize=False):
        super().__init__(network=lambda: torch.nn.Linear(4, 1))
        self.maximize = maximize

    def forward(self, inputs):
        return self.net(inputs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return ((batch[1] - 1) * self(batch[0])).mean()

    def configure_optimizers(self):
        groups = [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.5}]
        return torch.optim.SGD(groups, lr=0.2, maximize=self.maximize)


def summed(run, starts, end):
    """The sum over uses of examples, each with the gradients of the last of ``starts`` before it."""
    margins, losses = written_out(run)
    total = torch.zeros(QUERIES, EXAMPLES, dtype=torch.float64)
    for step in range(end):
        theta = run.theta_vector(max(start for start in starts if start <= step))
        products = jacrev(margins)(theta) @ jacrev(losses)(theta).T
        batch = run.batch_indices(step)
        for example in batch.tolist():
            total[:, example] += 0.2 * 0.9**step / len(batch) * products[:, example]
    return total


@pytest.mark.parametrize(
    ("checkpoints", "step", "starts"),
    [(None, None, range(STEPS)), (None, 5, range(5)), (3, None, (0, 3, 6)), (2, 5, (0, 2)), (1, None, (0,))],
)
def test_responses_are_the_sum_over_the_uses_of_an_example(classifiers, checkpoints, step, starts):
    found = ask(classifiers, TracIn(checkpoints), step=step)
    for number, run in enumerate(classifiers):
        expected = summed(run, starts, step or STEPS)
        torch.testing.assert_close(found.responses[number], expected, rtol=1e-10, atol=1e-12)
        baseline = written_out(run)[0](run.theta_vector(step or STEPS))
        torch.testing.assert_close(found.baseline[number], baseline, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("every", "maximize"), [("all", False), (4, False), (4, True)])
def test_for_losses_without_curvature_it_is_unrolled_differentiation(fit, tmp_path, every, maximize):
    data, queries = classification(), classification(QUERIES, seed=1)
    pl.seed_everything(0, verbose=False)
    recorder = TrajectoryRecorder(tmp_path, checkpoint_every=every)
    fit(Linear(maximize), DataLoader(data, 4, shuffle=True), recorder, max_steps=STEPS, max_epochs=-1)

    def answer(estimator):
        arguments = {"queries": queries, "measurement": "prediction", "progress": False}
        return attribute(Ensemble.open(tmp_path), Linear(), data, estimator=estimator, **arguments).responses

    unrolled = answer(UnrolledDifferentiation(horizon=None))
    assert bool(unrolled.any())
    torch.testing.assert_close(answer(TracIn()), unrolled, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(answer(TracIn(1)), unrolled, rtol=1e-10, atol=1e-12)


def test_groups_and_chunks_add_up(classifiers, monkeypatch):

    alone = ask(classifiers, TracIn())
    size = classifiers[0].layout.size
    monkeypatch.setattr(TracIn, "vectors", 2**29 / 8 / size)  # of 1 GiB: one query at a time
    groups = ask(classifiers, TracIn(), removals=[[0, 3], [7]])
    expected = torch.stack([alone.responses[..., [0, 3]].sum(-1), alone.responses[..., 7]], -1)
    torch.testing.assert_close(groups.responses, expected, rtol=1e-12, atol=1e-14)


def test_more_checkpoints_than_there_are_are_refused(classifiers):
    with pytest.raises(AttributionError, match=r"checkpoints=6; .* has 5 before step 5. Give at most 5"):
        ask(classifiers, TracIn(6), step=5)


@pytest.mark.parametrize("checkpoints", [0, -1, 1.5, True, "all"])
def test_numbers_of_checkpoints_that_are_none_are_refused(checkpoints):
    with pytest.raises(AttributionError, match="give a positive number, or None"):
        TracIn(checkpoints)
