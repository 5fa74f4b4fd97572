"""Average precision and paired differences, with their intervals."""

import numpy as np
from scipy.stats import t as student
from sklearn.metrics import average_precision_score

from lightning_dtda import GroundTruth


def precision(suspicions: dict[str, np.ndarray], wrong: np.ndarray, draws: int = 1000) -> dict[str, dict]:
    """Return the average precision of each method, and its difference to the first one, with 95 % intervals.

    Sentences are drawn again, wrong and right ones apart, and runs of each method.
    """
    generator, kinds = np.random.default_rng(0), (np.flatnonzero(wrong), np.flatnonzero(~wrong))
    values = {name: average_precision_score(wrong, rows.mean(0)) for name, rows in suspicions.items()}
    drawn = {name: [] for name in suspicions}
    for _ in range(draws):
        taken = np.concatenate([generator.choice(kind, len(kind)) for kind in kinds])
        for name, rows in suspicions.items():
            runs = generator.integers(len(rows), size=len(rows))
            drawn[name].append(average_precision_score(wrong[taken], rows[runs].mean(0)[taken]))
    name = next(iter(drawn))
    base, first, found = values[name], np.array(drawn[name]), {}
    for name, score in values.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        less = np.array(drawn[name]) - first
        p = min(1.0, 2 * (1 + min((less <= 0).sum(), (less >= 0).sum())) / (1 + draws))
        ends = np.quantile(less, [0.025, 0.975])
        found[name] = {"score": score, "low": low, "high": high, "first": base, "less": ends, "p": p}
    return found


def holm(values: list[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's method."""
    order = np.argsort(values)
    raised = np.maximum.accumulate([(len(values) - rank) * values[k] for rank, k in enumerate(order)])
    return np.minimum(raised, 1)[np.argsort(order)].tolist()


def interval(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Return the mean of paired differences, the ends of Student's 95 % interval, and the p-value."""
    mean, error, freedom = differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5, len(differences) - 1
    half = student.ppf(0.975, freedom) * error
    return mean, mean - half, mean + half, 2 * student.sf(abs(mean) / error, freedom)


def confirm(truth: GroundTruth, removals: list[tuple[tuple, tuple]], predicted: list[float]) -> list[dict]:
    """Compare, seed by seed, the change of a query's loss without its ten sentences and without ten random ones."""
    rows = []
    for query, (chosen, random) in enumerate(removals):
        change = {}
        for name, removed in (("chosen", chosen), ("random", random)):
            measured = truth.measurements[truth.removed.index(removed)] - truth.baseline
            change[name] = measured[:, query].double().numpy()
        rows.append({**change, "predicted": predicted[query], "paired": interval(change["chosen"] - change["random"])})
    for row, p in zip(rows, holm([row["paired"][3] for row in rows]), strict=True):
        row["holm"] = p
    return rows
