"""The accuracy of a run's responses, estimated on a sample of its steps at a small part of a sweep's cost."""

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
"""Change of the example weights in finite differences: far above rounding in double precision, but small enough that
training with Adam stays linear and hardly any input of a ReLU crosses zero (at 1e-6, one did in seven stretches of a
ViT)."""

STRETCH = 3
"""Number of steps in a diagnosed stretch: enough for errors of gradient and state to reach later steps."""

_COARSE_STEP = 0.3
"""The change for optimizers that round (Muon, to bfloat16), where smaller changes are lost in rounding."""


def weight_step(run: Run) -> float:
    """Return the change of the example weights for finite differences of a run."""
    return _COARSE_STEP if run.update.update.rounding else _STEP


Direction: TypeAlias = Callable[[Replay, int], tuple[Tensor, dict[str, Tensor]]]
"""Function from a replay and a step to the gradients of the measurement by parameters and running statistics."""


def diagnose(
    runs: Sequence[Run],
    make: Callable[[Sequence[Run], Precision], Replay],
    direction: Direction,
    end: int | None = None,
) -> list[Diagnosis]:
    r"""Compare responses between precisions and with finite differences of retraining, on two stretches of each run.

    The stretches are a few steps from the middle checkpoint, and from the last checkpoint before the end. v is a random
    direction of the example weights. u is a direction of the parameters (and running statistics) at the end of the
    stretch: the gradient of the measurement at its start.

    .. math::
        r_n = -\frac{d \langle u, \theta \rangle}{d w_n}, \qquad
        \frac{|\langle r, v \rangle + \Delta_v \langle u, \theta \rangle|}{\lVert r \rVert}, \qquad
        \frac{\lVert r_{32} - r_{64} \rVert}{\lVert r_{64} \rVert}

    with the central difference :math:`\Delta_v` in double precision. The result is the worse of the two stretches.

    Args:
        runs: Runs of equal shape.
        make: Function from some of the runs and a precision to their replay.
        direction: Function that computes u.
        end: Step whose parameters are measured; later steps are left out.

    Returns:
        One diagnosis for each run; empty if the module does not work in double precision.
    """
    try:
        return _diagnose(make(runs, "float64"), make(runs, "recorded"), direction, end)
    except ReplayError:
        if len(runs) == 1:
            return [Diagnosis(None, None)]
        return [
            diagnosis for run in runs for diagnosis in diagnose([run], make, direction, end) or [Diagnosis(None, None)]
        ]
    except Exception as error:  # the user's code may fail in any way with another dtype
        cause = error.__cause__ or error
        _log.warning(
            "Cannot compare responses with those in double precision: the module fails in float64 (%s: %s).",
            type(cause).__name__,
            (str(cause).strip().splitlines() or [""])[0],
        )
        return []


def _diagnose(double: Replay, recorded: Replay, direction: Direction, end: int | None) -> list[Diagnosis]:
    found = []
    end = double.steps if end is None else end
    stretches = [stretch for stretch in double.stretches if stretch[0] < end]
    # avoid the first stretch if there are others: with Adam, the first step has hardly any derivative
    for first, last in {stretches[len(stretches) // 2], stretches[-1]}:
        stretch = first, min(first + STRETCH, last, end)
        along = direction(double, first)
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
    """Return the change along u ``(runs,)`` per change of the example weights along v ``(runs, examples)``."""
    change = weight_step(replay.runs[0])
    changed = torch.zeros(len(along), dtype=along.dtype, device=along.device)
    for sign in (1, -1):
        theta, buffers = replay.retrain(1 + sign * change * weights, *stretch, averaged=False)
        changed += sign * (theta * along).sum(1)
        for name, part in along_statistics.items():
            changed += sign * (buffers[name] * part).flatten(1).sum(1)
    return changed / (2 * change)


def _random(replay: Replay, size: int) -> Tensor:
    # drawn on the CPU, for the same values on every device
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(replay.runs), size, generator=generator, dtype=torch.float64)
    return drawn.to(replay.device, replay.dtype)
