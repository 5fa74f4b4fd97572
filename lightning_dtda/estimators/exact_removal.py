"""Exact removal: every run is trained again without the examples, so nothing is approximated."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.estimator import Advance, Estimate, Estimator, Plan, Question, batches_of_equal_shape
from lightning_dtda.execution.memory import peak_memory
from lightning_dtda.replay import Precision
from lightning_dtda.replay.measuring import measure
from lightning_dtda.stacking.reweighted import prepared, without
from lightning_dtda.stacking.size import COPIES
from lightning_dtda.trajectory import Run


class ExactRemoval(Estimator):
    r"""The change itself, by repeating every run with the weights of the removed examples set to zero.

    .. math:: r_k = m(\theta_T \text{ with } w_n = 0 \text{ for } n \in S_k) - m(\theta_T)

    Order, batch slots and the divisor of the loss stay the same (arXiv 2506.12965, section 2), so this is what the
    other estimators approximate. It costs one training for each run and removal, whatever the number of queries: use it
    for a few groups of examples, whose effect is larger than the sum of the responses predicts. Responses to several
    groups still add up only to first order; make one group of what is removed together. Small networks are trained many
    at once.

    Args:
        precision: ``"recorded"``, or ``"float64"`` to compute in double precision, for removals whose effect is as
            small as rounding.

    Raises:
        AttributionError: If the precision is unknown.
    """

    def __init__(self, precision: Precision = "recorded") -> None:
        if precision not in ("recorded", "float64"):
            raise AttributionError(f'precision={precision!r}; choose "recorded" or "float64".')
        self.precision = precision

    @override
    def settings(self) -> dict[str, Any]:
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "precision": self.precision}

    @override
    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        trainings = len(runs) * len(question.removals)
        first = question.replay(runs[:1], self.precision)
        replay, size = prepared(first, trainings)
        together = replay.of([runs[0]] * size)
        theta, buffers = together.checkpoint(0)[0], together.buffers(0)

        def step() -> None:
            together.gradient(0, theta, buffers)

        step()  # traces
        started = perf_counter()
        step()
        seconds = (perf_counter() - started) / size
        of_one_run = min(size, len(question.removals))
        return Plan(
            batches=batches_of_equal_shape(runs, size // of_one_run),
            queries_per_chunk=len(question.queries),
            memory=peak_memory(step, replay.device) + COPIES * theta.numel() * theta.element_size(),
            seconds=trainings * first.steps * seconds,
            removals_per_chunk=of_one_run,
            stacked=replay is not first,
        )

    @override
    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        replay = question.replay(runs, self.precision)
        end = question.end(replay.steps)

        def measured(theta: Tensor, buffers: dict[str, Tensor]) -> Tensor:
            asked = question.queries, question.measurement
            return measure(replay.eager, theta, buffers, *asked, replay.time(end), question.draws)

        # in another precision, the difference from the recorded training is not the effect of a removal
        again = self.precision != "recorded"
        if again:
            baseline = measured(*without(replay, len(runs) * [()], end))
        else:
            replay.check_step(end - 1)
            baseline = measured(*replay.trained(end))
        groups = question.removals.groups or tuple((n,) for n in range(question.removals.examples))
        assert plan.removals_per_chunk is not None
        found, drift = [], replay.drift
        for start in range(0, len(groups), plan.removals_per_chunk):
            chunk = groups[start : start + plan.removals_per_chunk]
            trainings = replay.of([run for run in runs for _ in chunk]).stack(plan.stacked)
            changed = measured(*without(trainings, list(chunk) * len(runs), end))
            found.append(changed.unflatten(0, (len(runs), len(chunk))).transpose(1, 2))
            drift = trainings.drift[:: len(chunk)]
            advance(len(runs) * end * len(chunk) / len(groups))
        responses = torch.cat(found, 2) - baseline[..., None]
        if not bool(responses.isfinite().all()):
            run = runs[int((~responses.isfinite().flatten(1).all(1)).nonzero()[0])]
            raise AttributionError(
                f"{run.path} has measurements that are not finite, as trained or without some examples: the training "
                "diverged. Leave the run out, or remove other examples."
            )
        return Estimate(baseline, responses, drift)
