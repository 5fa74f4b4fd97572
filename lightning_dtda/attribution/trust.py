"""Which runs' responses may enter an average: telling the few that exploded from the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OUTLYING = 3.5
"""Modified z-score above which a value is an outlier, the value that Iglewicz and Hoaglin recommend (*How to Detect and
Handle Outliers*, 1993, section 3.3)."""

_DOUBLE = 2.0
"""Times the median: a run below it counts less than double in an average and is not worth the loss of a sample."""

FEWEST_RUNS = 8
"""With fewer runs, their spread is not known well enough to call one an outlier; all of them are trusted."""


_ILL_CONDITIONED = 0.05
"""Relative difference between responses in the recorded precision and in double from which the former are not to be
used."""


def response_norm(responses: Tensor) -> float:
    """Return the root mean square of a run's responses ``(queries, removals)``."""
    # query by query: in double precision all of them would be a copy of twice the size
    squares = sum(float(of_query.double().square().sum()) for of_query in responses)
    return math.sqrt(squares / responses.numel())


def sizes(responses: Tensor) -> dict[str, float]:
    """Return how large a run's responses ``(queries, removals)`` are."""
    return {"response_norm": response_norm(responses), "largest_response": float(responses.abs().max())}


def ill_conditioned(diagnoses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name the runs whose responses depend on the precision they are computed in.

    Args:
        diagnoses: By run, see :class:`~lightning_dtda.estimators.Diagnosis`; empty where none was made.

    Example:
        >>> ill_conditioned({"a": {"precision": 1e-6}, "b": {"precision": 0.2}, "c": {"precision": None}, "d": {}})
        ['b', 'c']
    """
    precisions = {run: diagnosis.get("precision", 0.0) for run, diagnosis in diagnoses.items()}
    # None: not even the parameters were reproduced in double precision
    return [run for run, precision in precisions.items() if precision is None or not precision <= _ILL_CONDITIONED]


def chaotic(norms: Mapping[str, float]) -> list[str]:
    r"""Name the runs whose responses are out of proportion to those of the others.

    Small changes of the weights grow exponentially in some trainings, most of all under Adam, where a second moment is
    nearly zero. The derivative of such a run is right and useless: it holds for changes far smaller than a removal, and
    its size wrecks every average over runs. With the norm :math:`\rho_s` of a run's responses, a run is chaotic if

    .. math::
        0.6745\, \frac{\log \rho_s - \mathrm{med}}{\mathrm{MAD}} > 3.5
        \quad\text{and}\quad \rho_s > 2\, e^{\mathrm{med}},

    med and MAD being the median of the :math:`\log\rho` and their median absolute deviation from it. Only runs
    with large norms are named: one on which removals do little does no harm.

    Args:
        norms: Each run's :func:`response_norm`, by name.

    Returns:
        Names; none for fewer than :data:`FEWEST_RUNS` runs.

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
