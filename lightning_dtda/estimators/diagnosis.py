"""How well a run's responses can be computed: asked of a sample of its steps, at a small part of a sweep's cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.estimator import Diagnosis
from lightning_dtda.estimators.sweep import no_state_cotangents, unroll
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run

_log = logging.getLogger(__name__)

_STEP = 1e-6
"""Change of the weights in the finite difference: below the linear range of trainings with Adam, far above what double
precision rounds to."""

_COARSE_STEP = 0.3
"""The same where the optimizer itself rounds (Muon, to bfloat16), so that smaller changes tell nothing."""


def weight_step(run: Run) -> float:
    """Return the change of a weight that finite differences of a run are taken with."""
    return _COARSE_STEP if run.update.update.rounding else _STEP


def diagnose(
    runs: Sequence[Run], make: Callable[[Sequence[Run], Precision], Replay], end: int | None = None
) -> list[Diagnosis]:
    r"""Compare responses in two precisions, and with finite differences of retraining, over two segments of each run.

    Over the steps between two checkpoints, the first two and the last two, with a random direction u of the parameters
    at their end and a random direction v of the weights:

    .. math::
        r_n = -\frac{d \langle u, \theta \rangle}{d w_n}, \qquad
        \frac{|\langle r, v \rangle + \Delta_v \langle u, \theta \rangle|}{\lVert r \rVert}, \qquad
        \frac{\lVert r_{32} - r_{64} \rVert}{\lVert r_{64} \rVert}

    with the central difference :math:`\Delta_v` in double precision. The worse of the two segments counts.

    Args:
        runs: Runs of equal shape.
        make: Stacks some of them in a precision.
        end: The step that is asked about; segments that begin there or later do not count.

    Returns:
        One for each run; none where the module does not compute in double precision.
    """
    try:
        return _diagnose(make(runs, "float64"), make(runs, "recorded"), end)
    except ReplayError:
        if len(runs) == 1:
            return [Diagnosis(None, None)]
        return [diagnosis for run in runs for diagnosis in diagnose([run], make, end) or [Diagnosis(None, None)]]
    except Exception as error:  # whatever the user's code does with numbers of another type
        _log.warning(
            "Responses are not compared with those in double precision, in which the module fails (%s: %s).",
            type(error).__name__,
            (str(error).strip().splitlines() or [""])[0],
        )
        return []


def _diagnose(double: Replay, recorded: Replay, end: int | None) -> list[Diagnosis]:
    found = []
    segments = [segment for segment in double.segments if end is None or segment[0] < end]
    for segment in {segments[0], segments[-1]}:
        responses = _responses(double, segment)
        norms = responses.norm(dim=1).clamp_min(torch.finfo(responses.dtype).tiny)
        again = responses if recorded.dtype == double.dtype else _responses(recorded, segment).to(responses)
        weights = _random(double, len(double.examples), seed=1)
        slopes = (responses * weights).sum(1)
        found.append(
            torch.stack(
                [
                    (slopes + _difference(double, segment, weights)).abs() / norms,
                    (again - responses).norm(dim=1) / norms,
                ]
            )
        )
    return [Diagnosis(*worst) for worst in torch.stack(found).amax(0).T.tolist()]


def _responses(replay: Replay, segment: tuple[int, int]) -> Tensor:
    """Return the responses of the parameters along u ``(runs, examples)``."""
    adjoint = _random(replay, replay.layout.size, seed=0)[:, None]
    responses = adjoint.new_zeros(len(adjoint), 1, len(replay.examples))
    unroll(replay, segment, responses, adjoint, no_state_cotangents(replay, adjoint), replay.no_statistics(adjoint))
    return responses[:, 0]


def _difference(replay: Replay, segment: tuple[int, int], weights: Tensor) -> Tensor:
    """Return the change of the parameters along u ``(runs,)`` per change of the weights ``(runs, examples)``."""
    direction, change = _random(replay, replay.layout.size, seed=0), weight_step(replay.runs[0])
    ends = [replay.retrain(1 + sign * change * weights, *segment, averaged=False)[0] for sign in (1, -1)]
    return ((ends[0] - ends[1]) * direction).sum(1) / (2 * change)


def _random(replay: Replay, size: int, seed: int) -> Tensor:
    # drawn in double and on the CPU: the same in either precision, on every device
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(replay.runs), size, generator=generator, dtype=torch.float64)
    return drawn.to(replay.device, replay.dtype)
