"""Which rows each method removes."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from examples.coin_toss.baselines import label_quality, out_of_fold, training_margins
from examples.coin_toss.flips import steadying, steadying_by_the_mean
from lightning_dtda import Attribution, suggest_removals

EACH = ("predicted flips, each case", "mean, majority, each case", "variance, each case")
"""Methods that choose rows for each decision on its own."""


def suggested(attribution: Attribution, goal, k: int, **options) -> list[int]:
    """Return k rows: those found with a caution of one standard error and, if they are fewer than k, more without."""
    # fresh seeds judge, so all runs may choose
    ways = [suggest_removals(attribution, goal, k, held_out=0.0, caution=c, **options).removals for c in (1.0, 0.0)]
    return list(dict.fromkeys(chain(*ways)))[:k]


def for_each_case(attribution: Attribution, k: int) -> dict[str, list[list[int]]]:
    """Return, for each query, the rows that each method of ``EACH`` removes for it alone."""
    cases = [attribution.select([q]) for q in range(len(attribution.queries))]
    ways = steadying, steadying_by_the_mean, lambda case, k: suggested(case, "reduce_variance", k)
    return {name: [way(case, k) for case in cases] for name, way in zip(EACH, ways, strict=True)}


def kept(path: Path, k: int, draws: int, choose: Callable[[], dict]) -> dict[str, list[list[int]]]:
    """Return the rows that an earlier call kept in a file, or choose and keep them if it chose fewer."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"random": []}
    if len(rows["random"]) != draws or len(rows["random"][0]) < k:
        rows = choose()
        path.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def choose(attribution, ensemble, make, data, every: int, k: int, draws: int) -> dict[str, list[list[int]]]:
    """Return the k rows that each method removes, in order; several sets for random ones.

    AUM is the margin averaged over training, lowest first (Pleiss et al., NeurIPS 2020); a data map's variability is
    the standard deviation over epochs of the given label's probability, highest first (Swayamdipta et al., EMNLP 2020).
    """
    make_trainer, make_module = make
    quality = label_quality(data.train.tensors[1], out_of_fold(make_module, data, make_trainer, seeds=16))
    of_training = training_margins(ensemble, make_module(), data, every)
    generator = torch.Generator().manual_seed(0)
    return {
        "predicted flips": [steadying(attribution, k)],
        "variance": [suggested(attribution, "reduce_variance", k)],
        "mean, correct": [suggested(attribution, "improve_mean", k, lower_is_better=False)],
        "mean, majority": [steadying_by_the_mean(attribution, k)],
        "cleanlab": [quality.argsort()[:k].tolist()],
        "AUM": [of_training.mean((0, 1)).argsort()[:k].tolist()],
        "data map": [of_training.sigmoid().std(1).mean(0).argsort(descending=True)[:k].tolist()],
        "random": [torch.randperm(len(data.train), generator=generator)[:k].tolist() for _ in range(draws)],
    }
