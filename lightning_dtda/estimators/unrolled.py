"""Unrolled differentiation: the derivative of the recorded training, back to where it forgets changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.diagnosis import diagnose
from lightning_dtda.estimators.estimator import (
    Advance,
    Diagnosis,
    Estimate,
    Estimator,
    Plan,
    Question,
    batches_of_equal_shape,
)
from lightning_dtda.estimators.forward import estimate_forward
from lightning_dtda.estimators.sweep import Adjoints, sweep
from lightning_dtda.estimators.sweep_costs import (
    DIAGNOSED_TOGETHER,
    Mode,
    choose,
    diagnosis_seconds,
    fastest_way,
    held_steps,
    needed_bytes,
    seconds,
)
from lightning_dtda.execution.memory import kept_pages
from lightning_dtda.replay import Precision, Replay, shape_key
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB, human_bytes, is_quantity

_DIAGNOSED_QUERIES = 4
"""Number of queries in the diagnosis, which uses the sum of their measurements: a single gradient may be zero."""


class UnrolledDifferentiation(Estimator):
    r"""Responses by differentiation of the recorded training, in reverse or forward mode.

    The response of a measurement m to the removal of example n is minus the derivative with respect to its weight,

    .. math:: r_n = -\frac{d\, m(\theta_T)}{d w_n},

    where a training step is :math:`\theta_{t+1}, s_{t+1} = U_t(\theta_t, s_t, g_t)` with
    :math:`g_t(\theta, w) = \sum_{n \in b_t} c_n w_n \nabla l_n(\theta)`. One backward sweep gives it for all N
    examples: starting from :math:`\lambda_T = \nabla m(\theta_T)`, the adjoint of :math:`U_t` yields the cotangent
    :math:`\bar g_t` of the gradient (:math:`-\eta_t \lambda_{t+1}` for plain SGD), and

    .. math::
        \frac{d m}{d w_n} \mathrel{+}= c_n \langle \nabla l_n(\theta_t), \bar g_t \rangle, \qquad
        \lambda_t = \bar\theta_t + H_t \bar g_t,

    both from one double backward pass. This is the transpose of Mlodozeniec et al., *Distributional Training
    Data Attribution*, NeurIPS 2025, arXiv 2506.12965, equation 6. It predicts removal as weight zero: order, batch
    slots and the loss's divisor stay the same.

    Forward mode propagates the responses of the parameters from start to end instead: one sweep per removal, for any
    number of queries, with no steps held in memory. Both modes give the same numbers for the same horizon.

    Args:
        runs_per_batch: Number of runs of equal shape to process together; ``"auto"`` chooses the fastest number that
            fits, from timed steps.
        precision: ``"recorded"``, or ``"float64"`` to replay and differentiate in double precision.
        memory_budget: Memory budget in GiB; queries are processed in chunks that fit in it.
        tolerance: Maximum deviation of a replay from its record; see ``lightning_dtda.replay.Replay``.
        horizon: Number of last steps to unroll; effects of an example before the horizon are left out. ``"auto"`` goes
            back, for each run and query, to the checkpoint where the norm of the adjoint is smallest. While the norm
            shrinks on the way back, training forgets perturbations. Where it grows again, training amplified them, and
            a derivative says little about changes as large as a removal: this happens in the first steps of many
            trainings with Adam. ``None`` unrolls all steps, which gives the exact derivative. Over five
            trainings of 8 epochs or more, ``"auto"`` predicted retraining better; with SGD and a few epochs, ``None``
            does (``benchmarks/defaults.py``).
        mode: ``"reverse"``, whose cost grows with the number of queries; ``"forward"``, whose cost grows with the
            number of removals; or ``"auto"`` for the cheaper one. ``horizon="auto"`` is in reverse mode.
        compile: Whether to compile the steps of reverse sweeps with ``torch.compile``, which takes ten seconds to two
            minutes once; ``"auto"`` to compile if there is enough work. Compiled steps are used only if they give the
            same results and are faster. Compilation needs a C++ compiler, or Triton on a GPU.

    Raises:
        AttributionError: If an argument is out of range.
    """

    def __init__(
        self,
        runs_per_batch: int | str = "auto",
        precision: Precision = "recorded",
        memory_budget: float = 4.0,
        tolerance: float = 1e-3,
        horizon: int | str | None = "auto",
        mode: Mode = "auto",
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        if not (runs_per_batch == "auto" or (isinstance(runs_per_batch, int) and runs_per_batch > 0)):
            raise AttributionError(f'runs_per_batch={runs_per_batch!r}; give "auto" or a positive number.')
        if precision not in ("recorded", "float64"):
            raise AttributionError(f'precision={precision!r}; choose "recorded" or "float64".')
        if not all(is_quantity(value) and value > 0 for value in (memory_budget, tolerance)):
            raise AttributionError(
                f"memory_budget={memory_budget!r} and tolerance={tolerance!r} must be positive numbers."
            )
        if not (horizon in (None, "auto") or (isinstance(horizon, int) and horizon > 0)):
            raise AttributionError(f'horizon={horizon!r}; give a positive number of steps, "auto", or None.')
        if mode not in ("auto", "reverse", "forward"):
            raise AttributionError(f'mode={mode!r}; choose "auto", "reverse" or "forward".')
        if compile not in (True, False, "auto"):
            raise AttributionError(f'compile={compile!r}; choose True, False or "auto".')
        if mode == "forward" and horizon == "auto":
            raise AttributionError(
                'horizon="auto" needs the norms of adjoints, which mode="forward" does not compute. Give '
                'horizon=None, a number of steps, or mode="reverse".'
            )
        self.runs_per_batch = runs_per_batch
        self.precision = precision
        self.memory_budget = memory_budget
        self.tolerance = tolerance
        self.horizon = horizon
        self.mode = mode
        self.compile = compile

    def settings(self) -> dict[str, Any]:
        """Return the arguments that the responses depend on; the others change only rounding."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name, "precision": self.precision, "horizon": self.horizon}

    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        """Choose batches of runs and queries by the memory and time of trials.

        Raises:
            AttributionError: If one query of one run does not fit in the memory budget.
        """
        queries = len(question.queries)
        replay = self._replay(runs[:1], question)
        budget = self.memory_budget * GIB
        costs = choose(self.mode, self.horizon, budget, replay, queries, question.removals)
        if costs.fewest > budget:
            what = "removal" if costs.mode == "forward" else "query"
            raise AttributionError(
                f"One {what} of one run needs about {human_bytes(costs.fewest)}; "
                f"memory_budget is {self.memory_budget:g} GiB. Raise it."
            )
        steps = sum(self._unrolled(run, question) for run in runs)

        def make(some: int) -> Replay:
            return self._replay(_alike(runs, some), question)

        way = fastest_way(
            make,
            costs,
            budget,
            None if self.runs_per_batch == "auto" else int(self.runs_per_batch),
            len(_alike(runs, len(runs))),
            steps,
            None if self.compile == "auto" else bool(self.compile),
        )
        is_forward = costs.mode == "forward"
        held = held_steps(replay, way, budget)
        left = budget - way.memory
        return Plan(
            batches=batches_of_equal_shape(runs, way.runs),
            queries_per_chunk=min(queries, max(1, int(left / costs.per_direction))) if is_forward else way.directions,
            memory=int(needed_bytes(replay, way, held, len(runs))),
            seconds=seconds(make, way, costs, held, steps) + len(runs) * diagnosis_seconds(replay, costs),
            removals_per_chunk=way.directions if is_forward else None,
            stacked=way.stacked,
            compiled=way.compiled,
            held=held,
            objects=way.objects,
        )

    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        """Sweep over a batch of runs: backwards for each chunk of queries, or forward for each chunk of removals."""
        replay = self._planned_replay(plan, question, runs)
        end = question.end(replay.steps)
        if plan.removals_per_chunk is not None:
            return self._estimate_forward(replay, question, plan, advance)
        numbers = torch.arange(len(question.queries)).split(plan.queries_per_chunk)
        baselines, responses, norms = [], [], []
        with kept_pages(replay.device):
            for chunk in numbers:
                baseline, adjoint, of_statistics = question.measure_with_gradients(replay, chunk.tolist())
                baselines.append(baseline)
                adjoints = Adjoints.at_end(replay, adjoint, of_statistics)
                del adjoint, of_statistics
                part, lengths = sweep(
                    replay,
                    adjoints,
                    len(question.examples),
                    self.horizon,
                    lambda steps: advance(steps / len(numbers)),
                    end,
                )
                # sum over groups chunk by chunk, to keep only the responses to groups
                responses.append(question.removals.total(part))
                norms.append(lengths)
        # with "auto", sweeps of different queries may end at different checkpoints
        steps = [step for step in norms[0] if all(step in lengths for lengths in norms)]
        # median on a GPU is not available with deterministic algorithms
        curves = torch.stack([torch.cat([part[step] for part in norms], 1) for step in steps]).cpu()
        curves = (curves / curves[0].clamp_min(torch.finfo(curves.dtype).tiny)).median(2).values.T
        return Estimate(
            torch.cat(baselines, 1),
            torch.cat(responses, 1) if len(responses) > 1 else responses[0],
            replay.drift,
            [dict(zip(map(str, steps), curve, strict=True)) for curve in curves.tolist()],
            self._diagnoses(runs, question, plan),
        )

    def _diagnoses(self, runs: Sequence[Run], question: Question, plan: Plan) -> list[Diagnosis]:
        some = range(min(len(question.queries), _DIAGNOSED_QUERIES))

        def direction(replay: Replay, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            _, adjoint, of_statistics = question.measure_with_gradients(replay, some, step)
            return adjoint.sum(1), {name: part.sum(1) for name, part in of_statistics.items()}

        return diagnose(runs, partial(self._planned_replay, plan, question), direction, question.end(runs[0].steps))

    def _planned_replay(
        self, plan: Plan, question: Question, runs: Sequence[Run], precision: Precision | None = None
    ) -> Replay:
        replay = self._replay(runs, question, precision)
        if precision is None:
            replay = replay.stack(plan.stacked).compile(plan.compiled)
        else:  # a diagnosis has too few steps to compile, and that of few runs too few to trace again
            is_traced = precision == self.precision or sum(map(len, plan.batches)) >= DIAGNOSED_TOGETHER
            replay = replay.stack(plan.stacked and is_traced)
        replay.held = plan.held
        return replay

    def _estimate_forward(self, replay: Replay, question: Question, plan: Plan, advance: Advance) -> Estimate:
        assert plan.removals_per_chunk is not None
        end = question.end(replay.steps)
        with kept_pages(replay.device):
            baseline, responses = estimate_forward(
                replay,
                question.removals.membership(replay.dtype, replay.device),
                question,
                removals_per_chunk=plan.removals_per_chunk,
                queries_per_chunk=plan.queries_per_chunk,
                start=end - self._unrolled(replay.runs[0], question),
                step=end,
                advance=advance,
            )
        return Estimate(baseline, responses, replay.drift, diagnoses=self._diagnoses(replay.runs, question, plan))

    def _unrolled(self, run: Run, question: Question) -> int:
        """Return the maximum number of steps to unroll."""
        end = question.end(run.steps)
        return min(end, self.horizon) if isinstance(self.horizon, int) else end

    def _replay(self, runs: Sequence[Run], question: Question, precision: Precision | None = None) -> Replay:
        return question.replay(runs, precision or self.precision, self.tolerance)


def _alike(runs: Sequence[Run], size: int) -> list[Run]:
    """Return up to ``size`` runs that have the same shape as the first run."""
    return [run for run in runs if shape_key(run) == shape_key(runs[0])][:size]
