"""Checks that an attribution answers by itself: how it was replayed, and whether its runs agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from typing_extensions import TypedDict

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.attribution_store import AttributionStore
from lightning_dtda.errors import AttributionError
from lightning_dtda.trajectory.schema import conform
from lightning_dtda.trajectory.storage import read_json, write_json

_KEPT = "check.json"

RELIABLE = 0.5
"""Split-half reliability below which a ranking is mostly seed noise."""


CHAOTIC = 0.25
"""Share of chaotic runs above which leaving them out is not enough."""


_TAME = "InfluenceFunctions() may help"


NOISE = (
    "A possible cause is a parameter whose gradient is zero up to rounding, such as a bias before BatchNorm: Adam "
    "turns the rounding into steps. Remove that parameter (bias=False)."
)


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Args:
        name: Name of the check.
        passed: Whether it passed.
        figure: The figures found.
        advice: What the result means, and what to do if the check did not pass.
    """

    name: str
    passed: bool
    figure: str
    advice: str


def unrolled(attribution: Attribution) -> bool:
    """Return whether the responses are derivatives of the training, which finite differences can check."""
    estimator = attribution.about.get("estimator")
    name = estimator.get("class", "") if isinstance(estimator, dict) else str(estimator or "UnrolledDifferentiation")
    return str(name).endswith("UnrolledDifferentiation")


def self_checks(attribution: Attribution) -> list[CheckResult]:
    """Check the replay, the precision and the size of the responses, and with four trusted runs whether they agree."""
    checks = [replay_check(attribution), precision_check(attribution), chaos_check(attribution)]
    if len((independent := attribution.independent()).trusted().runs) >= 4:
        checks.append(_agreement(independent))
    return checks


def replay_check(attribution: Attribution) -> CheckResult:
    """Return how far the replay was from the record; a replay that is too far off stops with an error instead."""
    of_runs = attribution.about["drift"].values()
    gradients = [drift["gradients"] for drift in of_runs if drift["gradients"] is not None]
    figure = f"parameters {max(drift['parameters'] for drift in of_runs):.1e}, gradients "
    figure += f"{max(gradients):.1e}" if gradients else "not recorded"
    return CheckResult("replay", True, figure, "Every step that was unrolled was reproduced, up to rounding.")


def precision_check(attribution: Attribution) -> CheckResult:
    """Check that rounding does not dominate the responses of any run."""
    found = [diagnosis.get("precision") for diagnosis in attribution.about.get("diagnosis", {}).values()]
    worst = max((precision for precision in found if precision is not None), default=float("nan"))
    failed, runs = attribution.ill_conditioned, len(attribution.runs)
    return CheckResult(
        "precision",
        not failed,
        f"responses in recorded and double precision differ by at most {worst:.1e}, on a sample of steps"
        + (f"; ill-conditioned: {len(failed)} of {runs} ({', '.join(failed)})" if failed else ""),
        "The recorded precision is enough."
        if not failed
        else 'Rounding dominates these responses: use UnrolledDifferentiation(precision="float64"). If finite '
        f"differences fail too, rounding affects the training itself. {NOISE}",
    )


def chaos_check(attribution: Attribution) -> CheckResult:
    """Check that only a few runs are chaotic."""
    chaotic, runs = attribution.chaotic, len(attribution.runs)
    passed = len(chaotic) <= CHAOTIC * runs
    return CheckResult(
        "chaotic runs",
        passed,
        f"{len(chaotic)} of {runs}" + (f" ({', '.join(chaotic)})" if chaotic else ""),
        ("Influences leave them out." if chaotic else "The responses of all runs are of similar size.")
        if passed
        else f"Too many to leave out. {_TAME}, or a smaller learning rate.",
    )


def _agreement(attribution: Attribution) -> CheckResult:
    reliability = float(attribution.reliability().median())
    return CheckResult(
        "agreement between runs",
        reliability >= RELIABLE,
        f"{reliability:.2f} (split-half reliability of the mean influence, median over queries)",
        "Other seeds would rank the examples similarly."
        if reliability >= RELIABLE
        else f"The ranking is mostly seed noise: record more runs. {_TAME}.",
    )


def keep_results(results: Sequence[CheckResult], path: str | Path) -> None:
    """Store the results of :func:`~lightning_dtda.check` with an attribution, for its reports.

    Args:
        results: The results.
        path: Directory of the attribution.

    Raises:
        AttributionError: If there is no attribution.
    """
    if not AttributionStore.is_at(path):
        raise AttributionError(f"{path} holds no attribution. Give the directory of one.")
    write_json(Path(path) / _KEPT, {"results": [asdict(result) for result in results]})


def kept_results(attribution: Attribution) -> list[CheckResult]:
    """Return the results of :func:`~lightning_dtda.check` that are stored with an attribution, if there are any.

    Raises:
        TrajectoryError: If the file is damaged.
    """
    path = None if attribution.path is None else attribution.path / _KEPT
    if path is None or not path.exists():
        return []
    content = read_json(path)
    conform(content, _Kept, path)
    return msgspec.convert(content["results"], list[CheckResult])


class _Kept(TypedDict):
    """Content of :data:`_KEPT`."""

    results: list[CheckResult]
