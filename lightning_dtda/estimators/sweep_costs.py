"""The plan of a sweep: forward or reverse mode, runs stacked or one by one, and sizes of batches and chunks."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.diagnosis import STRETCH
from lightning_dtda.estimators.forward import example_position
from lightning_dtda.estimators.removals import Removals
from lightning_dtda.estimators.sweep import no_state_cotangents
from lightning_dtda.execution.memory import COMPILER, OBJECTS, TRACES, kept_pages, peak_memory
from lightning_dtda.optimizers.clipping import NoClipping
from lightning_dtda.replay import Replay
from lightning_dtda.replay.pieces import FEWEST_HELD, rebuilt_steps
from lightning_dtda.units import human_seconds

_log = logging.getLogger(__name__)

Mode = Literal["auto", "reverse", "forward"]

_WORTH_TRACING = 2.0
"""Minimum number of seconds that stacking should save: tracing a step and comparing it takes half a second for a small
network and two seconds for a CNN."""

_OVERHEAD = 0.003
"""Python's part of a step on a CPU in seconds, which stacking saves: most of the step of a small network. On a GPU, it
is nearly all of the step."""

_LONG_STEP = 0.1
"""Maximum time of a step in seconds for stacking to pay off: it saves Python overhead, small in long steps."""

_COMPARED = 3
"""A step that was traced is compared for three runs with two directions each."""

DIAGNOSED_TOGETHER = 16
"""Number of runs from which their diagnoses are stacked. Tracing in double precision takes as long as the diagnosis of
16 runs of a small network, or of 4 runs of a CNN."""

_WORTHWHILE = 0.85
"""Maximum ratio of times per run at which a smaller batch of runs is preferred; smaller gains may be timing noise."""

_WORTH_COMPILING, _WORTH_COMPILING_ON_A_GPU = 400.0, 100.0
"""Minimum work in seconds for which steps are compiled by default. Compilation takes 10 s for a small network and a
minute for both halves of a transformer's step, and saves a quarter and a seventh of the time respectively; on a GPU,
half or more."""

_TIMED_DIRECTIONS = 8
"""Number of directions for timing a short step; the time of one more direction would be lost in the noise."""

_DIAGNOSED = 12
"""Cost of a step of the diagnosis of both stretches, in steps with one direction: 12 to 13 for a small network, a ViT
and a GPT on a CPU, 20 for a CNN, whose convolutions are slow in double precision."""

_TIMED_STEPS = 2
"""Number of timed steps, of which the fastest counts: the first one warms up, others may be disturbed."""


@dataclass(frozen=True)
class Costs:
    """Memory and time of a mode. Directions are queries in reverse mode, removals in forward mode.

    Args:
        mode: The mode.
        directions: Number of directions.
        per_run: Bytes per run, independent of the number of directions.
        per_direction: Bytes per direction of a chunk, if directions are computed one by one.
        alone: Bytes of a step's derivatives for one run and one direction, included in ``per_run``.
        diagnosis: Bytes for the diagnosis of a run, which runs after everything else.
        step: Function from a replay and a number of directions to a function that performs a step.
    """

    mode: Literal["reverse", "forward"]
    directions: int
    per_run: float
    per_direction: float
    alone: float
    diagnosis: float
    step: Callable[[Replay, int], Callable[[], object]]

    @property
    def fewest(self) -> float:
        """Bytes for one run with one direction."""
        return max(self.per_run + self.per_direction, self.diagnosis)

    def seconds(self, replay: Replay, directions: int) -> float:
        """Time a step."""
        return _timed(self.step(replay, directions), replay)

    def sweeps(self, way: Way) -> float:
        """Return the seconds for a step of one run in all sweeps; there is one sweep per chunk of directions."""
        return way.seconds * math.ceil(self.directions / way.directions)


@dataclass(frozen=True)
class Way:
    """How steps are computed.

    Args:
        stacked: Whether runs and directions are computed at once.
        runs: Number of runs that are processed together.
        directions: Number of directions in a chunk.
        per_run: Bytes per run, independent of the number of directions.
        per_direction: Bytes per direction and run.
        diagnosis: Bytes for the diagnosis of a run.
        seconds: Seconds for a step of one run.
        tracing: Bytes while a step is traced and compared, in the precision of the sweep.
        compiled: Whether steps are compiled.
        objects: Bytes of what this process keeps besides tensors.
    """

    stacked: bool
    runs: int
    directions: int
    per_run: float
    per_direction: float
    diagnosis: float
    seconds: float
    tracing: float = 0.0
    compiled: bool = False
    objects: int = OBJECTS + TRACES

    @property
    def memory(self) -> float:
        """Bytes of a sweep that holds the minimum number of steps."""
        return self.runs * (self.per_run + self.directions * self.per_direction)


def choose(
    mode: Mode, horizon: int | str | None, budget: float, replay: Replay, queries: int, removals: Removals
) -> Costs:
    """Return the costs of the requested mode; with ``"auto"``, of the mode that takes fewer sweeps.

    A step costs about the same for a query in reverse mode and for a removal in forward mode, so their numbers decide.

    Args:
        mode: Requested mode.
        horizon: Requested horizon; only reverse mode supports ``"auto"``.
        budget: Memory budget in bytes.
        replay: Replay of a run, for trials.
        queries: Number of queries Q.
        removals: The K removals.
    """
    costs_grow = f"the cost grows with the {queries} queries, not with the {len(removals)} removals"
    if mode == "auto" and (horizon == "auto" or queries <= len(removals)):
        why = 'horizon="auto" needs adjoints (horizon=None may take forward mode)' if horizon == "auto" else costs_grow
        _log.info("Reverse mode: %s.", why)
        mode = "reverse"
    if mode == "reverse":
        return reverse_costs(replay, queries, removals)
    costs = forward_costs(replay, queries, len(removals))
    if mode == "auto":
        if costs.fewest > budget:
            return reverse_costs(replay, queries, removals)
        _log.info("Forward mode: the cost grows with the %d removals, not with the %d queries.", len(removals), queries)
    return costs


def reverse_costs(replay: Replay, queries: int, removals: Removals) -> Costs:
    """Return the costs of reverse mode, by trials."""

    def step(replay: Replay, directions: int) -> Callable[[], object]:
        point, buffers = replay.point(0), replay.buffers(0)
        cotangents = torch.ones(
            len(replay.runs), directions, replay.layout.size, dtype=replay.dtype, device=replay.device
        )
        read = cotangents, no_state_cotangents(replay, cotangents), replay.no_statistics(cotangents)

        def take() -> object:
            of_theta, of_states, of_statistics = copy.deepcopy(read)  # copies, because they are part of a step's memory
            direct, _, along = replay.adjoint(0, point, of_theta, of_states)
            _, found = replay.directional(0, point, along, buffers, of_statistics)
            return found.products + direct

        return take

    alone = _peak(step(replay, 1), replay)
    # the response to a group is the sum over its examples, whose responses exist twice for a moment
    of_examples = 0 if removals.is_leave_one_out else 2 * removals.examples * replay.dtype.itemsize
    responses = 2 * queries * len(removals) * replay.dtype.itemsize
    return Costs(
        "reverse",
        queries,
        alone + _fewest_bytes(replay) + responses,
        _vectors_bytes(replay) + of_examples,
        alone,
        _diagnosis_bytes(alone, replay) + responses / 2,
        step,
    )


def forward_costs(replay: Replay, queries: int, removals: int) -> Costs:
    """Return the costs of forward mode, by trials."""

    def step(replay: Replay, directions: int) -> Callable[[], object]:
        position, membership = example_position(replay, directions)
        return lambda: replay.push(copy.deepcopy(position), membership)

    alone = _peak(step(replay, 1), replay)
    # the responses, and the membership of examples in removals
    kept = 2 * queries * removals * replay.dtype.itemsize + removals * len(replay.examples) * replay.dtype.itemsize
    vectors = _vectors_bytes(replay)
    return Costs("forward", removals, alone + kept, vectors, alone, _diagnosis_bytes(alone, replay) + kept, step)


def _diagnosis_bytes(step: float, replay: Replay) -> float:
    """Return the bytes for the diagnosis of a run in double precision, given the bytes of a step in its own precision.

    Besides a step, the diagnosis holds the steps of a stretch, the module's parameters, and the random direction.
    """
    vectors = STRETCH * _point_size(replay) + 2 * replay.layout.size
    return torch.float64.itemsize * (step / replay.dtype.itemsize + vectors)


def _point_size(replay: Replay) -> int:
    """Return the number of elements in a run's state at a step: parameters, gradients and optimizer state."""
    gradients = 1 if isinstance(replay.clipping, NoClipping) else 2
    return (1 + gradients) * replay.layout.size + _state_size(replay)


def _fewest_bytes(replay: Replay) -> float:
    """Return the bytes of the minimum number of held steps, and of the start of one piece of each size."""
    longest = _longest(replay)
    sizes = max(0, math.ceil(math.log2(longest / FEWEST_HELD)))
    start = replay.layout.size + _state_size(replay)
    point = _point_size(replay)
    held = start if replay.reads_gradients_again else point
    return (point + (min(longest, FEWEST_HELD) - 1) * held + sizes * start) * replay.dtype.itemsize


def _longest(replay: Replay) -> int:
    return max(last - first for first, last in replay.stretches)


def _vectors_bytes(replay: Replay) -> float:
    """Return the bytes of a direction's vectors: parameters and state before and after a step, and its own vector."""
    return (3 * replay.layout.size + 2 * _state_size(replay)) * replay.dtype.itemsize


def _state_size(replay: Replay) -> int:
    """Return the number of elements in the optimizer state of a run."""
    return sum(part.shape[-1] for state in replay.checkpoint(0)[1] for part in state.values())


def held_steps(replay: Replay, way: Way, budget: float) -> int:
    """Return the number of steps held per run: the minimum, plus what fits in the remaining memory.

    If gradients were recorded, rebuilding a step takes only the optimizer's update. Compared with derivatives that are
    not stacked, this time is not worth the memory.
    """
    if replay.rebuilds_from_gradients and not way.stacked:
        return FEWEST_HELD
    more = (budget - way.memory) / (way.runs * _point_size(replay) * replay.dtype.itemsize)
    return max(FEWEST_HELD, min(_longest(replay), FEWEST_HELD + math.floor(more)))


def needed_bytes(replay: Replay, way: Way, held: int, runs: int) -> float:
    """Return the peak memory in bytes.

    Args:
        replay: Replay of a run.
        way: How steps are computed.
        held: Number of steps held per run.
        runs: Number of all runs.
    """
    more = way.runs * max(0, held - FEWEST_HELD) * _point_size(replay) * replay.dtype.itemsize
    # diagnoses that are stacked trace in double precision
    tracing = way.tracing * (torch.float64.itemsize / replay.dtype.itemsize if runs >= DIAGNOSED_TOGETHER else 1)
    return max(way.memory + more, way.runs * way.diagnosis, tracing)


def seconds(make: Callable[[int], Replay], way: Way, costs: Costs, held: int, steps: int) -> float:
    """Return the seconds to unroll the given number of steps.

    Args:
        make: Function from a number of runs to their replay.
        way: How steps are computed.
        costs: Costs of the mode.
        held: Number of steps that are held.
        steps: Number of steps of all runs that are unrolled for each chunk of directions.
    """
    total = steps * costs.sweeps(way)
    replay = make(way.runs if way.stacked else 1).stack(way.stacked)
    if costs.mode == "reverse" and not replay.rebuilds_from_gradients:
        stretches = [last - first for first, last in replay.stretches]
        rebuilt = sum(rebuilt_steps(stretch, held) for stretch in stretches) / sum(stretches)
        point = replay.checkpoint(0)[0], replay.buffers(0)
        rebuilding = _timed(partial(replay.gradient, 0, *point), replay) / len(replay.runs)
        total += steps * math.ceil(costs.directions / way.directions) * rebuilt * rebuilding
    return total


def diagnosis_seconds(replay: Replay, costs: Costs) -> float:
    """Return the seconds to diagnose a run, in recorded and in double precision."""
    return _DIAGNOSED * STRETCH * costs.seconds(replay, 1)


def fastest_way(
    make: Callable[[int], Replay],
    costs: Costs,
    budget: float,
    asked: int | None,
    most: int,
    steps: int,
    compiles: bool | None = None,
) -> Way:
    """Choose how steps are computed.

    Args:
        make: Function from a number of runs to their replay.
        costs: Costs of the mode.
        budget: Memory budget in bytes.
        asked: Requested number of runs to process together; ``None`` to choose it.
        most: Number of runs of the same shape.
        steps: Number of steps of all runs that are unrolled for each chunk of directions.
        compiles: Whether to compile steps; ``None`` to compile if that saves time.

    Raises:
        AttributionError: If the requested number of runs does not fit in the memory budget.
    """
    alone = make(1)
    runs = asked or 1
    directions = min(costs.directions, int((budget / runs - costs.per_run) / costs.per_direction))
    if directions < 1 or runs * costs.diagnosis > budget:
        raise AttributionError(
            f"runs_per_batch={runs} does not fit in memory_budget; at most {int(budget / costs.fewest)} runs fit."
        )
    directions = _chunk(costs.directions, directions)
    one = costs.seconds(alone, 1)
    taken = _one_by_one(alone, costs, one, directions)
    best = eager = Way(False, runs, directions, costs.per_run, costs.per_direction, costs.diagnosis, taken)
    saved = steps * costs.sweeps(eager) * (min(1.0, _OVERHEAD / one) if alone.device.type == "cpu" else 1.0)
    if saved >= _WORTH_TRACING and one <= _LONG_STEP and alone.can_stack:
        stacked = _stacked(make, costs, budget, asked, most)
        if stacked is not None and costs.sweeps(stacked) < costs.sweeps(eager):
            best = stacked
    if compiles is None:
        enough = _WORTH_COMPILING if alone.device.type == "cpu" else _WORTH_COMPILING_ON_A_GPU
        compiles = steps * costs.sweeps(best) >= enough
    if not compiles or costs.mode == "forward":
        return best
    _log.info("Compiling a step, because about %s of work remains.", human_seconds(steps * costs.sweeps(best)))
    compiled = _compiled(make, costs, best)
    best = replace(best, objects=best.objects + COMPILER)
    if compiled is None or compiled.memory > budget:
        return best
    share = costs.sweeps(compiled) / costs.sweeps(best)
    _log.info("Compiled steps take %.2f times as long%s.", share, "" if share < 1 else ", so they are not used")
    return compiled if share < 1 else best


def _chunk(total: int, most: int) -> int:
    """Return the size of the fewest possible chunks, of equal size so that a step is compiled only once."""
    return math.ceil(total / math.ceil(total / most))


def _one_by_one(replay: Replay, costs: Costs, one: float, directions: int) -> float:
    """Return the seconds for a step of one run with directions one after another, given the time with one direction."""
    some = min(directions, _TIMED_DIRECTIONS if one < _LONG_STEP else 2)
    each = (costs.seconds(replay, some) - one) / (some - 1) if some > 1 else 0.0
    return one + max(each, 0.0) * (directions - 1)


def _compiled(make: Callable[[int], Replay], costs: Costs, way: Way) -> Way | None:
    """Return a way with compiled steps; ``None`` if they cannot be compiled."""
    size, directions = (way.runs, way.directions) if way.stacked else (1, 1)
    replay = make(size).stack(way.stacked).compile()
    take = costs.step(replay, directions)
    take()
    if not replay.ways.has_compiled:
        return None
    peak, objects = _peak(take, replay) / size, way.objects + COMPILER
    if way.stacked:
        per_run = max(way.per_run, costs.per_run + peak - directions * way.per_direction)
        return replace(
            way, compiled=True, objects=objects, per_run=per_run, seconds=costs.seconds(replay, directions) / size
        )
    return replace(
        way,
        compiled=True,
        objects=objects,
        per_run=way.per_run + max(peak - costs.alone, 0),
        # each direction computes the gradient again
        per_direction=way.per_direction + replay.layout.size * replay.dtype.itemsize,
        seconds=_one_by_one(replay, costs, costs.seconds(replay, 1), way.directions),
    )


def _stacked(make: Callable[[int], Replay], costs: Costs, budget: float, asked: int | None, most: int) -> Way | None:
    """Return the stacked way with the fastest number of runs that fits; ``None`` if none fits."""
    alone = make(1).stack()
    costs.step(alone, 1)()
    peaks = [_peak(costs.step(alone, n), alone) for n in (1, 2)]
    per_direction = max(peaks[1] - peaks[0], 0) + costs.per_direction
    read_again = (_fewest_bytes(alone) - _fewest_bytes(make(1))) if costs.mode == "reverse" else 0
    per_run = max(costs.per_run, costs.per_run + peaks[0] - per_direction) + read_again
    diagnosis = max(costs.diagnosis, _diagnosis_bytes(peaks[0], alone))
    tracing = _COMPARED * peaks[1]
    directions = min(costs.directions, int((budget / (asked or 1) - per_run) / per_direction))
    if directions < 1 or tracing > budget:
        return None
    directions = _chunk(costs.directions, directions)
    needed = max(per_run + directions * per_direction, diagnosis)
    fit = max(1, int(budget / needed)) if directions == costs.directions else 1
    size = asked or min(fit, most)
    seconds = costs.seconds(make(size).stack(), directions)
    while asked is None and size > 1:
        smaller = -(-size // 2)
        timed = costs.seconds(make(smaller).stack(), directions)
        if timed / smaller > _WORTHWHILE * seconds / size:
            break
        size, seconds = smaller, timed
    return Way(True, size, directions, per_run, per_direction, diagnosis, seconds / size, tracing)


def _peak(function: Callable[[], object], replay: Replay) -> float:
    function()  # what the first call caches is not part of a step's memory
    return peak_memory(function, replay.device)


def _timed(function: Callable[[], object], replay: Replay) -> float:
    """Return the seconds of the fastest of a few calls."""
    fastest = math.inf
    with kept_pages(replay.device):
        for _ in range(_TIMED_STEPS):
            start = time.perf_counter()
            function()
            if replay.device.type == "cuda":
                torch.cuda.synchronize(replay.device)
            fastest = min(fastest, time.perf_counter() - start)
    return fastest
