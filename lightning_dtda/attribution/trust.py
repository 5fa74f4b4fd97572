"""Which runs to trust: detection of chaotic and ill-conditioned runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OUTLYING = 5.0
"""Standard deviations of the logarithms of typical norms beyond which a norm is an outlier.

Customary are 3.5 (Iglewicz and Hoaglin, *How to Detect and Handle Outliers*, 1993, section 3.3), but heavy-tailed norms
of healthy runs lie beyond that so often that averages lose 5 to 9 % of their size at 8 runs (``benchmarks/power.py``).
"""

_TIMES = 3.0
"""Multiple of the median below which no run is chaotic, however alike the others are: it hardly spoils an average.

On the task of ``benchmarks/chaotic_runs.py``, predictions of the mean score 0.34 with all runs, 0.67 without the only
one above 10 times, 0.72 without the three above 3 times, and no better without a fourth above 2 times.
"""

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
        \log \rho_s - \mathrm{med} > \max\left(5\, \frac{\mathrm{MAD}}{0.6745},\; \log 3\right),

    where med is the median of the :math:`\log\rho` and MAD their median absolute deviation from it, which is 0.6745
    standard deviations of a Gaussian. Only large norms count as outliers: a run with small responses does no harm.

    Leaving out runs because they are large makes averages smaller. Where all runs are healthy, the rule takes less than
    2 % from an average of log-normal responses with :math:`\sigma = 1`, less than 4 % with 1.5, and less than 0.5 % of
    Gaussian and exponential ones, at 8 runs and less at more (``benchmarks/power.py``).

    Args:
        norms: :func:`response_norm` of each run, by name.

    Returns:
        Names of the chaotic runs, those with a NaN norm included; empty if fewer than :data:`FEWEST_RUNS` runs have a
        finite norm.

    Example:
        >>> norms = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 30.0]
        >>> chaotic({f"seed-{seed}": norm for seed, norm in enumerate(norms)})
        ['seed-7']
    """
    above = torch.tensor(list(norms.values()), dtype=torch.float64).log()
    finite = above[above.isfinite()]
    if len(finite) < FEWEST_RUNS:
        return []
    median = finite.quantile(0.5)
    limit = max(_OUTLYING * float((finite - median).abs().quantile(0.5)) / 0.6745, math.log(_TIMES))
    # a norm that is not a number exceeds every limit
    return [name for name, height in zip(norms, (above - median).tolist(), strict=True) if not height <= limit]
