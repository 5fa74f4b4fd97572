"""Problems for all packages: trained networks, data, losses and measurements. Does not use lightning_dtda.

The concrete problem is that of ``examples/concrete``, the mnist problem that of ``ground_truth/mnist``. The others are
a CNN with GroupNorm (105,994 parameters, 2,000 images, SGD with momentum) and a GPT (813,824 parameters, 400 sequences
of 32 tokens, AdamW), both on synthetic data.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

QUERIES, BATCH = 20, 50
EXAMPLES, EPOCHS = {"cnn": 2000, "gpt": 400}, {"cnn": 3, "gpt": 6}
VOCABULARY, LENGTH = 64, 32


@dataclass(frozen=True)
class Problem:
    """Trained networks, and the question to answer about them.

    Args:
        make: Function that creates a network.
        final: Parameters of each run after training.
        initial: Parameters of each run before training.
        orders: Training examples in each batch of each run ``(T, B)``.
        rates: Learning rate of each step.
        momentum: Momentum of SGD; ``None`` if another optimizer was used.
        train: Training inputs and targets.
        asked: Queries.
        losses: Function from outputs and targets to the loss of each example; the training minimized their mean.
        measurement: Function from outputs and targets to the measurement of each query.
        sampled: Function that draws targets from the distribution whose negative log likelihood is the loss.
        criterion: The mean loss as a torch module.
        batch: Batch size, for methods that work in batches.
    """

    make: Callable[[], nn.Module]
    final: list[dict[str, Tensor]]
    initial: list[dict[str, Tensor]]
    orders: list[Tensor]
    rates: Tensor
    momentum: float | None
    train: TensorDataset
    asked: TensorDataset
    losses: Callable[[Tensor, Tensor], Tensor]
    measurement: Callable[[Tensor, Tensor], Tensor]
    sampled: Callable[[Tensor], Tensor]
    criterion: nn.Module
    batch: int

    def first(self, runs: int | None) -> "Problem":
        """Return the problem of the first runs."""
        return replace(self, final=self.final[:runs])

    def trained(self, run: int) -> nn.Module:
        """Return the trained network of a run."""
        network = self.make()
        network.load_state_dict(self.final[run])
        return network.eval()

    def batches(self) -> DataLoader:
        """Return the training examples in order."""
        return DataLoader(self.train, self.batch)


def network(width: int) -> nn.Sequential:
    """Return the network of ``examples/concrete``."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def classifier(width: int) -> nn.Sequential:
    """Return the network of ``ground_truth/mnist``."""
    return nn.Sequential(nn.Linear(196, width), nn.GELU(), nn.Linear(width, 10))


def cnn() -> nn.Module:
    """A CNN for small images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(96, 288), nn.ReLU(), nn.Linear(288, 10)),
    )


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attention, then a layer for each token."""
        parts = self.attention(self.before(hidden)).chunk(3, 2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(attended.transpose(1, 2).flatten(2))
        return hidden + self.narrow(functional.gelu(self.widen(self.between(hidden))))


class GPT(nn.Module):
    """A GPT like that of nanoGPT."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores for each token ``(B, T, C)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.last(self.blocks(self.tokens(tokens) + self.positions(places))))


def examples_of(net: str) -> TensorDataset:
    """Return a net's training examples, and after them the queries: noisy patterns, or chains of tokens."""
    generator = torch.Generator().manual_seed(0)
    count = EXAMPLES[net] + QUERIES
    if net == "cnn":
        labels = torch.randint(10, (count,), generator=generator)
        patterns = torch.randn(10, 3, 16, 16, generator=generator)
        return TensorDataset(0.3 * patterns[labels] + torch.randn(count, 3, 16, 16, generator=generator), labels)
    tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)
    follows = torch.randperm(VOCABULARY, generator=generator)
    kept = torch.rand(tokens.shape, generator=generator) < 0.7
    for place in range(LENGTH):
        tokens[:, place + 1] = torch.where(kept[:, place], follows[tokens[:, place]], tokens[:, place + 1])
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


NETS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "gpt": GPT}


def parts(net: str) -> tuple[TensorDataset, TensorDataset]:
    """Return training examples and queries."""
    every, count = examples_of(net), EXAMPLES[net]
    return TensorDataset(*every[:count]), TensorDataset(*every[count:])


def cross_entropies(scores: Tensor, labels: Tensor) -> Tensor:
    """Return each example's cross entropy, the mean over its tokens."""
    found = functional.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
    return found.reshape(len(scores), -1).mean(1)


def labels_of(scores: Tensor) -> Tensor:
    """Draw labels from the network's distribution."""
    return torch.multinomial(scores.softmax(-1).flatten(0, -2), 1).reshape(scores.shape[:-1])


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the log-odds of each example's correct class."""
    correct = labels[:, None] == torch.arange(scores.shape[1])
    return (scores * correct).sum(1) - scores.masked_fill(correct, -torch.inf).logsumexp(1)


def load(name: str, path: str, queries: int | None = None) -> Problem:
    """Return the named problem, with the runs that :func:`tensors_of` read and the given number of queries."""
    tensors = load_file(path)
    orders, rates = list(tensors.pop("orders")), tensors.pop("rates")
    data = {key: tensors.pop(key) for key in ("inputs", "targets", "queries", "query_targets") if key in tensors}

    def of_runs(kind: str) -> list[dict[str, Tensor]]:
        names = [key for key in tensors if key.startswith(kind)]
        return [{key.removeprefix(kind): tensors[key][run] for key in names} for run in range(len(orders))]

    final, initial = of_runs("final."), of_runs("initial.")
    some = slice(queries)
    if name == "concrete":
        return Problem(
            *(lambda: network(len(final[0]["0.bias"])), final, initial, orders, rates, 0.0),
            train=TensorDataset(data["inputs"], data["targets"]),
            # the target of a query is never used
            asked=TensorDataset(data["queries"][some], torch.zeros(len(data["queries"]))[some]),
            losses=lambda outputs, targets: (outputs.squeeze(-1) - targets).square(),
            measurement=lambda outputs, targets: outputs.squeeze(-1),
            # (f - y)^2 is the negative log likelihood of a normal distribution of variance 1/2
            sampled=lambda outputs: torch.normal(outputs.squeeze(-1), 0.5**0.5),
            criterion=nn.MSELoss(),
            batch=len(data["inputs"]),
        )
    if name == "mnist":
        return Problem(
            *(lambda: classifier(len(final[0]["0.bias"])), final, initial, orders, rates, 0.9),
            train=TensorDataset(data["inputs"], data["targets"]),
            asked=TensorDataset(data["queries"][some], data["query_targets"][some]),
            losses=cross_entropies,
            measurement=margins,
            sampled=labels_of,
            criterion=nn.CrossEntropyLoss(),
            batch=len(data["inputs"]),
        )
    train, asked = parts(name)
    return Problem(
        *(NETS[name], final, initial, orders, rates, 0.9 if name == "cnn" else None),
        train=train,
        asked=TensorDataset(*asked[some]),
        losses=cross_entropies,
        measurement=cross_entropies,
        sampled=labels_of,
        criterion=nn.CrossEntropyLoss(),
        batch=256 if name == "cnn" else 64,
    )


def tensors_of(ensemble: Iterable[Any]) -> dict[str, Tensor]:
    """Return the tensors of recorded runs that :func:`load` reads: parameters before and after, batches and rates."""
    runs = list(ensemble)
    found = {}
    for kind in ("final", "initial"):
        thetas = [run.theta(run.steps if kind == "final" else 0) for run in runs]
        found |= {
            f"{kind}.{name.removeprefix('network.')}": torch.stack([theta[name] for theta in thetas])
            for name in thetas[0]
        }
    found["orders"] = torch.stack([torch.stack([run.batch_indices(t) for t in range(run.steps)]) for run in runs])
    return found | {"rates": torch.cat([runs[0].learning_rates(t) for t in range(runs[0].steps)])}
