"""How well a run's responses can be computed: asked of a sample of its steps, at a small part of a sweep's cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.estimators.estimator import Diagnosis
from lightning_dtda.estimators.sweep import Adjoints, unroll
from lightning_dtda.replay import Precision, Replay
from lightning_dtda.trajectory import Run

_log = logging.getLogger(__name__)

_STEP = 1e-7
"""Change of the weights in the finite difference: within the linear range of trainings with Adam, where hardly an input
of a ReLU crosses its kink (at 1e-6 one did in seven stretches of a ViT), and far above what double precision rounds to.
"""

STRETCH = 3
"""Steps of a stretch that is diagnosed: enough for errors to go from one step to the next, of gradient and state."""

_COARSE_STEP = 0.3
"""The same where the optimizer itself rounds (Muon, to bfloat16), so that smaller changes tell nothing."""


def weight_step(run: Run) -> float:
    """Return the change of a weight that finite differences of a run are taken with."""
    return _COARSE_STEP if run.update.update.rounding else _STEP


Measured: TypeAlias = Callable[[Replay, int], tuple[Tensor, dict[str, Tensor]]]
"""Given a replay and a step, returns the gradients of the measurement there, by parameters and running statistics."""


def diagnose(
    runs: Sequence[Run],
    make: Callable[[Sequence[Run], Precision], Replay],
    measured: Measured,
    end: int | None = None,
) -> list[Diagnosis]:
    r"""Compare responses in two precisions, and with finite differences of retraining, over two stretches of each run.

    Over a few steps from the checkpoint in the middle, and from the last one before the end, with a random direction v
    of the weights, and a direction u of the parameters (and running statistics) at their end: the gradient of what is
    measured, at their start.

    .. math::
        r_n = -\frac{d \langle u, \theta \rangle}{d w_n}, \qquad
        \frac{|\langle r, v \rangle + \Delta_v \langle u, \theta \rangle|}{\lVert r \rVert}, \qquad
        \frac{\lVert r_{32} - r_{64} \rVert}{\lVert r_{64} \rVert}

    with the central difference :math:`\Delta_v` in double precision. The worse of the two stretches counts.

    Args:
        runs: Runs of equal shape.
        make: Stacks some of them in a precision.
        measured: What u is.
        end: The step that is asked about; steps from it on do not count.

    Returns:
        One for each run; none where the module does not compute in double precision.
    """
    try:
        return _diagnose(make(runs, "float64"), make(runs, "recorded"), measured, end)
    except ReplayError:
        if len(runs) == 1:
            return [Diagnosis(None, None)]
        return [
            diagnosis for run in runs for diagnosis in diagnose([run], make, measured, end) or [Diagnosis(None, None)]
        ]
    except Exception as error:  # whatever the user's code does with numbers of another type
        cause = error.__cause__ or error
        _log.warning(
            "Responses are not compared with those in double precision, in which the module fails (%s: %s).",
            type(cause).__name__,
            (str(cause).strip().splitlines() or [""])[0],
        )
        return []


def _diagnose(double: Replay, recorded: Replay, measured: Measured, end: int | None) -> list[Diagnosis]:
    found = []
    end = double.steps if end is None else end
    segments = [segment for segment in double.segments if segment[0] < end]
    # not the first one, where there is another: with Adam, the first step has hardly any derivative
    for first, last in {segments[len(segments) // 2], segments[-1]}:
        stretch = first, min(first + STRETCH, last, end)
        along = measured(double, first)
        responses = _responses(double, stretch, *along)
        norms = responses.norm(dim=1).clamp_min(torch.finfo(responses.dtype).tiny)
        again = responses if recorded.dtype == double.dtype else _responses(recorded, stretch, *along).to(responses)
        weights = _random(double, len(double.examples))
        slopes = (responses * weights).sum(1)
        found.append(
            torch.stack(
                [
                    (slopes + _difference(double, stretch, *along, weights)).abs() / norms,
                    (again - responses).norm(dim=1) / norms,
                ]
            )
        )
    return [Diagnosis(*worst) for worst in torch.stack(found).amax(0).T.tolist()]


def _responses(replay: Replay, stretch: tuple[int, int], along: Tensor, along_statistics: dict[str, Tensor]) -> Tensor:
    """Return the responses along u ``(runs, examples)``."""
    adjoint = along[:, None].to(replay.dtype)
    of_statistics = {name: part[:, None].to(replay.dtype) for name, part in along_statistics.items()}
    responses = adjoint.new_zeros(len(adjoint), 1, len(replay.examples))
    unroll(replay, stretch, responses, Adjoints.at_end(replay, adjoint, of_statistics))
    return responses[:, 0]


def _difference(
    replay: Replay, stretch: tuple[int, int], along: Tensor, along_statistics: dict[str, Tensor], weights: Tensor
) -> Tensor:
    """Return the change along u ``(runs,)`` per change of the weights ``(runs, examples)``."""
    change = weight_step(replay.runs[0])
    changed = torch.zeros(len(along), dtype=along.dtype, device=along.device)
    for sign in (1, -1):
        theta, buffers = replay.retrain(1 + sign * change * weights, *stretch, averaged=False)
        changed += sign * (theta * along).sum(1)
        for name, part in along_statistics.items():
            changed += sign * (buffers[name] * part).flatten(1).sum(1)
    return changed / (2 * change)


def _random(replay: Replay, size: int) -> Tensor:
    # drawn on the CPU: the same on every device
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(replay.runs), size, generator=generator, dtype=torch.float64)
    return drawn.to(replay.device, replay.dtype)
