"""What others would remove: rows that look mislabelled, hard or unstable, whatever the decision in question."""

import torch
from cleanlab.rank import get_label_quality_scores
from torch import Tensor
from torch.func import functional_call, vmap

from lightning_dtda import Ensemble, retrain


def out_of_fold(make_module, data, make_trainer, seeds: int, folds: int = 5) -> Tensor:
    """Return the probability of each row's given label ``(rows,)`` by networks that were trained without the row."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    parts = [part.tolist() for part in order.chunk(folds)]
    truth = retrain(
        make_module, data, trainer=make_trainer, subsets=parts, seeds=seeds, baseline_seeds=1,
        queries=data.train, measurement="margin", stacked=True, progress=False,
    )  # fmt: skip
    found = torch.empty(len(data.train))
    for part, margins in zip(parts, truth.measurements, strict=True):
        found[part] = margins[:, part].sigmoid().mean(0)
    return found


def label_quality(given: Tensor, probability: Tensor) -> Tensor:
    """Return cleanlab's quality of each label ``(rows,)`` (Northcutt et al., *JAIR* 70, 2021); low is suspicious."""
    classes = torch.empty(len(given), 2)
    classes[torch.arange(len(given)), given] = probability
    classes[torch.arange(len(given)), 1 - given] = 1 - probability
    return torch.as_tensor(get_label_quality_scores(given.numpy(), classes.numpy()))


def training_margins(ensemble: Ensemble, module, data, every: int) -> Tensor:
    """Return the margin of each row's given label after each epoch, ``every`` steps ``(runs, epochs, rows)``."""
    inputs, given = data.train.tensors
    found = []
    for run in ensemble:
        parameters = [run.theta(step) for step in range(every, run.steps + 1, every)]
        stacked = {name: torch.stack([each[name] for each in parameters]) for name in parameters[0]}
        scores = vmap(lambda values: functional_call(module, values, (inputs,)))(stacked)
        found.append(scores[..., torch.arange(len(given)), given] - scores[..., torch.arange(len(given)), 1 - given])
    return torch.stack(found)
