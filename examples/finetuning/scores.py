"""Paired differences, predicted against real sizes, and average precision, with their intervals."""

import numpy as np
from scipy.stats import t as student
from sklearn.metrics import average_precision_score

from lightning_dtda import Attribution, GroundTruth, evaluate
from lightning_dtda.evaluation import compare

Removals = list[tuple[tuple, tuple]]
"""For each query, the sentences chosen for it and random ones."""


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


def confirm(truth: GroundTruth, removals: Removals) -> list[dict]:
    """Compare, seed by seed, the change of a query's loss without its sentences and without random ones.

    Returns:
        A row for each query, with changes ``(seeds,)``, and the mean and p-values of their difference; then a row for
        their average over queries. A seed is one number there, since its trainings share what is random.
    """
    rows = []
    for query, (chosen, random) in enumerate(removals):
        without = [truth.measurements[truth.removed.index(each), :, query] for each in (chosen, random)]
        change = [(each - truth.baseline[:, query]).double().numpy() for each in without]
        rows.append(dict(zip(("chosen", "random"), change, strict=True)))
    rows.append({name: np.mean([row[name] for row in rows], 0) for name in ("chosen", "random")})
    for row in rows:
        row["paired"] = interval(row["chosen"] - row["random"])
    for row, p in zip(rows, [*holm([row["paired"][3] for row in rows[:-1]]), rows[-1]["paired"][3]], strict=True):
        row["holm"] = p
    return rows


def sizes(
    truth: GroundTruth, removals: Removals, attributions: dict[str, Attribution], draws: int = 2000
) -> dict[str, dict]:
    """Compare the size and order of predicted changes with the real ones, for each estimator.

    Returns:
        By estimator: what it predicts for each query without its sentences (and on average over queries), the same less
        that without random ones, the ratio of the real to the predicted average difference, with an interval over
        recorded runs and fresh seeds; the correlation with retraining over all removals, and its difference to that of
        the first; and how many of a query's first sentences are those of the first estimator.
    """
    generator, found = np.random.default_rng(0), {}
    real = confirm(truth, removals)[-1]
    real = real["chosen"] - real["random"]
    taken = generator.integers(len(real), size=(draws, len(real)))
    for name, each in attributions.items():
        attribution = each.trusted()
        change = [
            [attribution.responses[:, q][:, list(removed)].double().sum(1).numpy() for removed in pair]
            for q, pair in enumerate(removals)
        ]
        chosen, random = np.array(change).transpose(1, 0, 2)  # (queries, runs) each
        predicted = (chosen - random).mean(0)
        drawn = predicted[generator.integers(len(predicted), size=(draws, len(predicted)))].mean(1)
        top = attribution.influence("mean").argsort(1, descending=True)
        found[name] = {
            "chosen": [*chosen.mean(1), chosen.mean()],
            "difference": predicted.mean(),
            "ratio": (real.mean() / predicted.mean(), *np.quantile(real[taken].mean(1) / drawn, [0.025, 0.975])),
            "evaluation": evaluate(attribution, truth, ["mean"]),
            "shared": [
                len({*pair[0]} & {*order[: len(pair[0])].tolist()}) for order, pair in zip(top, removals, strict=True)
            ],
        }
    first = next(iter(found.values()))["evaluation"]
    for each in found.values():
        each["gain"] = compare(each["evaluation"], first)["mean"]
    return found


def precision(suspicions: dict[str, np.ndarray], wrong: np.ndarray, draws: int = 1000) -> dict[str, dict]:
    """Return the average precision of each method, and its difference to the first one, with 95 % intervals.

    Sentences are drawn again, wrong and right ones apart, and runs of each method. The p-values of the differences are
    adjusted for their number.
    """
    generator, kinds = np.random.default_rng(0), (np.flatnonzero(wrong), np.flatnonzero(~wrong))
    drawn = {name: [] for name in suspicions}
    for _ in range(draws):
        taken = np.concatenate([generator.choice(kind, len(kind)) for kind in kinds])
        for name, rows in suspicions.items():
            runs = generator.integers(len(rows), size=len(rows))
            drawn[name].append(average_precision_score(wrong[taken], rows[runs].mean(0)[taken]))
    found, first = {}, None
    for name, rows in suspicions.items():
        mean, (low, high) = rows.mean(0), np.quantile(drawn[name], [0.025, 0.975])
        found[name] = each = {"score": average_precision_score(wrong, mean), "low": low, "high": high}
        each["chance"] = wrong.mean()  # of a random order
        each["found"] = int(wrong[np.argsort(-mean)[: wrong.sum()]].sum())
        if first is None:
            first = name
            continue
        less = np.array(drawn[name]) - drawn[first]
        each["less"] = (each["score"] - found[first]["score"], *np.quantile(less, [0.025, 0.975]))
        each["p"] = min(1.0, 2 * (1 + min((less <= 0).sum(), (less >= 0).sum())) / (1 + draws))
    others = [name for name in found if name != first]
    for name, p in zip(others, holm([found[name]["p"] for name in others]), strict=True):
        found[name]["holm"] = p
    return found
