"""Unrolled differentiation: the exact derivative of the training that took place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.diagnosis import diagnose
from lightning_dtda.estimators.estimator import Advance, Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.forward import estimate_forward, forward_memory, forward_seconds_per_step
from lightning_dtda.estimators.measuring import measure
from lightning_dtda.estimators.memory import kept_pages, peak_memory
from lightning_dtda.estimators.modes import Costs, Mode, choose
from lightning_dtda.estimators.removals import Removals
from lightning_dtda.estimators.sweep import no_state_cotangents, sweep
from lightning_dtda.replay import Precision, Replay, shape_key
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB, human_bytes

_WORTHWHILE = 0.85
"""A smaller batch of runs must take at most this share of the time of a run; less is within what timings vary by."""

_TIMED_STEPS = 4
"""Steps whose fastest is taken as the time of a step: the first one warms up, others may be disturbed."""


class UnrolledDifferentiation(Estimator):
    r"""Exact responses by differentiating the recorded training, in reverse or in forward mode.

    The response of a measurement m to the removal of example n is minus the derivative with respect to its weight,

    .. math:: r_n = -\frac{d\, m(\theta_T)}{d w_n},

    where the training's step is :math:`\theta_{t+1}, s_{t+1} = U_t(\theta_t, s_t, g_t)` with
    :math:`g_t(\theta, w) = \sum_{n \in b_t} c_n w_n \nabla l_n(\theta)`. One sweep backwards gives it for all N
    examples: starting from :math:`\lambda_T = \nabla m(\theta_T)`, the adjoint of :math:`U_t` yields the cotangent
    :math:`\bar g_t` of the gradient (:math:`-\eta_t \lambda_{t+1}` for plain SGD), and

    .. math::
        \frac{d m}{d w_n} \mathrel{+}= c_n \langle \nabla l_n(\theta_t), \bar g_t \rangle, \qquad
        \lambda_t = \bar\theta_t + H_t \bar g_t,

    both from one forward-over-reverse pass. This is the transpose of Mlodozeniec et al., *Distributional Training
    Data Attribution*, NeurIPS 2025, arXiv 2506.12965, equation 6. It predicts removal as weight zero: order, batch
    slots and the loss's divisor stay as they were.

    In forward mode the responses of the parameters are carried from the start to the end instead: one sweep for each
    removal, whatever the number of queries, with no steps held in memory. Both modes give the same numbers.

    Args:
        runs_per_batch: Runs of equal shape that are swept together; ``"auto"`` takes the fastest that fits, from
            timed steps.
        precision: ``"recorded"``, or ``"float64"`` to replay and differentiate in double.
        memory_budget: In GiB; queries are swept in chunks that stay below it.
        tolerance: Largest deviation of a replay from its record; see ``lightning_dtda.replay.Replay``.
        horizon: How many of the last steps to unroll; ``None`` is all, the exact derivative. What an example did before
            the horizon is then left out. ``"auto"`` goes back, for each run and query, to the checkpoint where the
            adjoint is shortest: as long as it shrinks, the training forgets perturbations;
            where it grows again on the way back, the training amplified them, and a derivative says little about
            changes as large as a removal. That is so for the first steps of many trainings with Adam.
        mode: ``"reverse"``, which pays for each query; ``"forward"``, which pays for each removal; or ``"auto"``, the
            cheaper one.

    Raises:
        AttributionError: If an argument is out of range.
    """

    def __init__(
        self,
        runs_per_batch: int | str = "auto",
        precision: Precision = "recorded",
        memory_budget: float = 4.0,
        tolerance: float = 1e-3,
        horizon: int | str | None = None,
        mode: Mode = "auto",
    ) -> None:
        if not (runs_per_batch == "auto" or (isinstance(runs_per_batch, int) and runs_per_batch > 0)):
            raise AttributionError(f'runs_per_batch={runs_per_batch!r}; give "auto" or a positive number.')
        if precision not in ("recorded", "float64"):
            raise AttributionError(f'precision={precision!r}; choose "recorded" or "float64".')
        if memory_budget <= 0 or tolerance <= 0:
            raise AttributionError("memory_budget and tolerance must be positive.")
        if not (horizon in (None, "auto") or (isinstance(horizon, int) and horizon > 0)):
            raise AttributionError(f'horizon={horizon!r}; give a positive number of steps, "auto", or nothing.')
        if mode not in ("auto", "reverse", "forward"):
            raise AttributionError(f'mode={mode!r}; choose "auto", "reverse" or "forward".')
        if mode == "forward" and horizon == "auto":
            raise AttributionError(
                'horizon="auto" looks for the step from which adjoints grow on the way back; mode="forward" has none. '
                'Give a number of steps, or mode="reverse".'
            )
        self.runs_per_batch = runs_per_batch
        self.precision = precision
        self.memory_budget = memory_budget
        self.tolerance = tolerance
        self.horizon = horizon
        self.mode = mode

    def settings(self) -> dict[str, Any]:
        """Return what the responses depend on; how the work is batched changes no more than rounding."""
        settings = {"class": f"{type(self).__module__}.{type(self).__qualname__}", "precision": self.precision}
        return settings | ({} if self.horizon is None else {"horizon": self.horizon})

    def plan(self, runs: Sequence[Run], question: Question) -> Plan:
        """Batch runs and queries by measured memory and time.

        Raises:
            AttributionError: If not even one query of one run fits the memory budget.
        """
        queries, removals = len(question.queries), len(question.removals)
        replay = self._replay(runs[:1], question)
        budget = self.memory_budget * GIB
        costs = choose(
            self.mode,
            self.horizon,
            budget,
            queries,
            removals,
            lambda: Costs("reverse", queries, *_memory(replay, queries, question.removals), _seconds_per_step),
            lambda: Costs("forward", removals, *forward_memory(replay, queries, removals), forward_seconds_per_step),
        )
        per_run, per_direction = costs.per_run, costs.per_direction
        if not costs.fit(budget):
            needed = f"needs about {human_bytes(per_run + per_direction)}; memory_budget is {self.memory_budget:g} GiB."
            raise AttributionError(
                f"One removal of one run {needed} Raise it."
                if costs.mode == "forward"
                else f"One query of one run {needed} Raise it, or record with a smaller checkpoint_every: all steps "
                "between two checkpoints are held at once."
            )
        chunk = min(costs.directions, int((budget - per_run) / per_direction))
        most = max(1, int(budget / (per_run + chunk * per_direction))) if chunk == costs.directions else 1
        if self.runs_per_batch == "auto":
            size, seconds_per_step = self._fastest(runs, question, min(most, len(runs)), chunk, costs.time)
        else:
            size = int(self.runs_per_batch)
            if size > most:
                size, chunk = size, int((budget / size - per_run) / per_direction)
                if chunk < 1:
                    raise AttributionError(
                        f"runs_per_batch={size} does not fit memory_budget={self.memory_budget:g} GiB; "
                        f"at most {most} do."
                    )
            seconds_per_step = costs.time(self._replay(_alike(runs, size), question), chunk)
        batches: list[tuple[Run, ...]] = []
        for _, group in groupby(sorted(runs, key=shape_key), key=shape_key):
            alike = list(group)
            batches += [tuple(alike[start : start + size]) for start in range(0, len(alike), size)]
        chunks = -(-costs.directions // chunk)
        is_forward = costs.mode == "forward"
        return Plan(
            batches=tuple(batches),
            queries_per_chunk=min(queries, int((budget / size - per_run) / per_direction)) if is_forward else chunk,
            memory=int(size * (per_run + chunk * per_direction)),
            seconds=sum(self._unrolled(batch[0], question) * len(batch) for batch in batches)
            * chunks
            * seconds_per_step
            / size,
            removals_per_chunk=chunk if is_forward else None,
        )

    def estimate(self, runs: Sequence[Run], question: Question, plan: Plan, advance: Advance) -> Estimate:
        """Sweep some runs: backwards, once for each chunk of queries, or forwards, once for each chunk of removals."""
        replay = self._replay(runs, question)
        end = question.end(replay.steps)
        if plan.removals_per_chunk is not None:
            return self._estimate_forward(replay, question, plan, advance)
        queries = question.queries.to((replay.recorded_dtype, replay.dtype), replay.device)
        numbers = torch.arange(len(queries)).split(plan.queries_per_chunk)
        baselines, responses, norms = [], [], []
        with kept_pages(replay.device):
            for chunk in numbers:
                baseline, adjoint, of_statistics = measure(replay, queries.fetch(chunk), question.measurement, end)
                baselines.append(baseline)
                part, lengths = sweep(
                    replay,
                    adjoint,
                    of_statistics,
                    len(question.examples),
                    self.horizon,
                    lambda steps: advance(steps / len(numbers)),
                    end,
                )
                # chunk by chunk, so that of many queries' responses only the groups' are kept
                responses.append(question.removals.total(part))
                norms.append(lengths)
        # with "auto", sweeps of different queries may end at different checkpoints
        steps = [step for step in norms[0] if all(step in lengths for lengths in norms)]
        curves = torch.stack([torch.cat([part[step] for part in norms], 1) for step in steps])
        curves = (curves / curves[0].clamp_min(torch.finfo(curves.dtype).tiny)).median(2).values.T
        return Estimate(
            torch.cat(baselines, 1),
            torch.cat(responses, 1) if len(responses) > 1 else responses[0],
            replay.drift,
            [dict(zip(map(str, steps), curve, strict=True)) for curve in curves.tolist()],
            diagnose(runs, lambda some, precision: self._replay(some, question, precision), end),
        )

    def _estimate_forward(self, replay: Replay, question: Question, plan: Plan, advance: Advance) -> Estimate:
        assert plan.removals_per_chunk is not None
        end = question.end(replay.steps)
        with kept_pages(replay.device):
            baseline, responses = estimate_forward(
                replay,
                question.removals.membership(replay.dtype, replay.device),
                question.queries.to((replay.recorded_dtype, replay.dtype), replay.device),
                question.measurement,
                removals_per_chunk=plan.removals_per_chunk,
                queries_per_chunk=plan.queries_per_chunk,
                start=end - self._unrolled(replay.runs[0], question),
                step=end,
                advance=advance,
            )
        # the diagnosis sweeps backwards, over the steps between two checkpoints
        fits = _held_bytes(replay) * len(replay.runs) <= self.memory_budget * GIB
        diagnoses = (
            diagnose(replay.runs, lambda some, precision: self._replay(some, question, precision), end) if fits else ()
        )
        return Estimate(baseline, responses, replay.drift, diagnoses=diagnoses)

    def _unrolled(self, run: Run, question: Question) -> int:
        """Return the number of steps that are unrolled, at the most."""
        end = question.end(run.steps)
        return min(end, self.horizon) if isinstance(self.horizon, int) else end

    def _replay(self, runs: Sequence[Run], question: Question, precision: Precision | None = None) -> Replay:
        return Replay(
            runs,
            question.module,
            question.examples,
            precision=precision or self.precision,
            device=question.device,
            tolerance=self.tolerance,
        )

    def _fastest(
        self, runs: Sequence[Run], question: Question, most: int, chunk: int, time: Callable[[Replay, int], float]
    ) -> tuple[int, float]:
        """Halve the number of runs from the largest that fits as long as that makes a run faster.

        Larger batches need less Python for a run, smaller ones fit caches.
        """
        size = min(most, len(_alike(runs, most)))
        seconds = time(self._replay(_alike(runs, size), question), chunk)
        while size > 1:
            smaller = -(-size // 2)
            timed = time(self._replay(_alike(runs, smaller), question), chunk)
            if timed / smaller > _WORTHWHILE * seconds / size:
                break
            size, seconds = smaller, timed
        return size, seconds


def _alike(runs: Sequence[Run], size: int) -> list[Run]:
    """Return up to ``size`` runs of the shape that most runs share with the first."""
    return [run for run in runs if shape_key(run) == shape_key(runs[0])][:size]


def _memory(replay: Replay, queries: int, removals: Removals) -> tuple[float, float]:
    """Measure the bytes that a run needs whatever the queries, and what each query adds."""
    point = replay.point(0)
    buffers = replay.buffers(0)
    peaks = []
    for count in (1, 2):
        directions = torch.randn(1, count, replay.layout.size, dtype=replay.dtype, device=replay.device)

        def products(directions: Tensor = directions) -> object:
            return replay.directional(0, point, directions, buffers, _statistics_cotangents(replay, directions))

        products()  # what the first call reads and keeps is none of a step's memory
        peaks.append(peak_memory(products, replay.device))
    vector = replay.layout.size * replay.dtype.itemsize
    states = sum(len(state) for state in point.states)
    per_pair = max(peaks[1] - peaks[0], vector)
    # the held segment, which the diagnosis holds in double; the responses and what is kept to join the chunks
    per_run = max(peaks[0] - per_pair, 0) + _held_bytes(replay) + 2 * queries * len(removals) * replay.dtype.itemsize
    # a group's response is summed up from those of its examples, which are there twice for a moment
    of_examples = 0 if removals.is_leave_one_out else 2 * removals.examples * replay.dtype.itemsize
    # adjoints of parameters and state, before and after the step
    return per_run, per_pair + 2 * (1 + states) * vector + of_examples


def _held_bytes(replay: Replay) -> float:
    """Return the bytes of a run's longest segment, in double."""
    longest = max(last - first for first, last in replay.segments)
    states = sum(len(state) for state in replay.checkpoint(0)[1])
    return longest * (2 + states) * replay.layout.size * torch.float64.itemsize


def _seconds_per_step(replay: Replay, queries: int) -> float:
    """Time a step of the sweep: the adjoint of the update and the products, which are almost all of it."""
    point = replay.point(0)
    buffers = replay.buffers(0)
    cotangents = torch.randn(len(replay.runs), queries, replay.layout.size, dtype=replay.dtype, device=replay.device)
    states = no_state_cotangents(replay, cotangents)
    fastest = float("inf")
    with kept_pages(replay.device):
        for _ in range(_TIMED_STEPS):
            start = time.perf_counter()
            direct, _, directions = replay.adjoint(0, point, cotangents, states)
            of_statistics = _statistics_cotangents(replay, cotangents)
            _, slopes, products, _ = replay.directional(0, point, directions, buffers, of_statistics)
            ((products + direct)[0, 0, 0] + slopes[0, 0, 0]).item()  # waits for the device
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _statistics_cotangents(replay: Replay, directions: Tensor) -> dict[str, Tensor]:
    """Return cotangents of the running statistics for directions ``(runs, queries, P)``, for measuring costs."""
    statistics = replay.statistics(replay.buffers(0))
    return {
        name: part.unsqueeze(1).expand(-1, directions.shape[1], *part.shape[1:]) for name, part in statistics.items()
    }
