"""Which runs to trust: detection of chaotic and ill-conditioned runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OUTLYING = 3.5
"""Modified z-score above which a value is an outlier, as recommended by Iglewicz and Hoaglin (*How to Detect and Handle
Outliers*, 1993, section 3.3)."""

_DOUBLE = 2.0
"""Multiple of the median below which no run is chaotic: it has less than double weight in an average, which does not
justify the loss of a sample."""

FEWEST_RUNS = 8
"""Minimum number of runs: with fewer, the spread is too uncertain to call one an outlier, so all are trusted."""


_ILL_CONDITIONED = 0.05
"""Relative difference between responses in the recorded and in double precision above which a run is
ill-conditioned."""


def response_norm(responses: Tensor) -> float:
    """Return the root mean square of a run's responses ``(queries, removals)``."""
    # query by query: a double-precision copy of all would take twice the memory
    squares = sum(float(of_query.double().square().sum()) for of_query in responses)
    return math.sqrt(squares / responses.numel())


def sizes(responses: Tensor) -> dict[str, float]:
    """Return the norm and the largest of a run's responses ``(queries, removals)``."""
    return {"response_norm": response_norm(responses), "largest_response": float(responses.abs().max())}


def ill_conditioned(diagnoses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the runs whose responses depend on the precision they are computed in.

    Args:
        diagnoses: :class:`~lightning_dtda.estimators.Diagnosis` of each run, as a mapping; empty if there is none.

    Example:
        >>> ill_conditioned({"a": {"precision": 1e-6}, "b": {"precision": 0.2}, "c": {"precision": None}, "d": {}})
        ['b', 'c']
    """
    precisions = {run: diagnosis.get("precision", 0.0) for run, diagnosis in diagnoses.items()}
    # None: double precision did not even reproduce the parameters
    return [run for run, precision in precisions.items() if precision is None or not precision <= _ILL_CONDITIONED]


def chaotic(norms: Mapping[str, float]) -> list[str]:
    r"""Return the names of the runs whose responses are out of proportion to those of the others.

    In some trainings, small changes of the weights grow exponentially, above all with Adam, where a second moment is
    nearly zero. The derivative of such a run is correct but useless: it holds only for changes far smaller than a
    removal, and its size dominates every average over runs. With the norm :math:`\rho_s` of a run's responses, a run is
    chaotic if

    .. math::
        0.6745\, \frac{\log \rho_s - \mathrm{med}}{\mathrm{MAD}} > 3.5
        \quad\text{and}\quad \rho_s > 2\, e^{\mathrm{med}},

    where med is the median of the :math:`\log\rho` and MAD their median absolute deviation from it. Only large norms
    count as outliers: a run with small responses does no harm.

    Args:
        norms: :func:`response_norm` of each run, by name.

    Returns:
        Names of the chaotic runs; empty for fewer than :data:`FEWEST_RUNS` runs.

    Example:
        >>> norms = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 30.0]
        >>> chaotic({f"seed-{seed}": norm for seed, norm in enumerate(norms)})
        ['seed-7']
    """
    if len(norms) < FEWEST_RUNS:
        return []
    logarithms = torch.tensor(list(norms.values()), dtype=torch.float64).log()
    above = logarithms - logarithms.median()
    outlying = 0.6745 * above > OUTLYING * above.abs().median()
    verdicts = outlying & (above > math.log(_DOUBLE))
    return [name for name, verdict in zip(norms, verdicts.tolist(), strict=True) if verdict]
