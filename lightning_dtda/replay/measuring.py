"""Measurements of trained models, and their derivatives with respect to the models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import vmap

from lightning_dtda.compatibility import tree_flatten, tree_unflatten
from lightning_dtda.errors import AttributionError, DTDAError
from lightning_dtda.replay.cut import zeros
from lightning_dtda.replay.eager import Eager
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.kernels import tolerated
from lightning_dtda.replay.measurements import Measurement, loss
from lightning_dtda.replay.random_states import drawn_from
from lightning_dtda.replay.ranges import EVERYTHING, Range, known_range
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import ByName

_log = logging.getLogger(__name__)

_QUERIES_AT_A_TIME = 256
"""Number of queries to pass through all models at once; bounds the memory."""


@dataclass(frozen=True)
class Draws:
    """How to take a measurement that draws random numbers, such as the loss of a diffusion model or a VAE.

    Args:
        number: Number of draws to average over.
        seed: Seed of the draws. They are the same for all runs, and different for each query.
    """

    number: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 1:
            raise AttributionError(f"measurement_draws={self.number!r}; give a positive integer.")

    def of(self, query: int) -> list[int]:
        """Return the seeds for a query."""
        generator = torch.Generator().manual_seed(hash((self.seed, query)) % 2**63)
        return torch.randint(2**31, (self.number,), generator=generator).tolist()


def measure_with_gradients(
    eager: Eager,
    theta: Tensor,
    buffers: ByName,
    queries: Examples,
    numbers: Sequence[int],
    measurement: Measurement,
    where: Sequence[str],
    time: Time,
    draws: Draws,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    r"""Take a measurement of some models together with its derivatives, one query at a time.

    Args:
        eager: Eager implementation that runs the module.
        theta: Parameters ``(runs, P)``.
        buffers: Buffers and frozen parameters, each ``(runs, ...)``.
        queries: All queries.
        numbers: Positions of the Q queries to measure.
        measurement: Measurement m.
        where: Description of each model for error messages, such as "the end of runs/seed-0001".
        time: Time of the training.
        draws: Draws to take if the measurement draws random numbers.

    Returns:
        The values :math:`m(\theta)` ``(runs, queries)``, their gradients ``(runs, queries, P)``, and their derivatives
        with respect to BatchNorm's running statistics, each ``(runs, queries, ...)``.

    Raises:
        AttributionError: If the measurement cannot be differentiated, or is not finite.
    """
    runs, names = len(theta), eager.statistics.names
    values = theta.new_empty(runs, len(numbers))
    gradients = theta.new_empty(runs, len(numbers), theta.shape[1])
    of_statistics = {name: buffers[name].new_empty(runs, len(numbers), *buffers[name].shape[1:]) for name in names}
    replica = eager.replica
    with replica.generators.kept(), replica.passing(training=False):
        replica.trainer.time = time
        for place, query in enumerate(numbers):
            for run in range(runs):
                held = {name: tensor[run].detach() for name, tensor in buffers.items()}
                leaves = {name: held[name].clone().requires_grad_() for name in names}
                replica.load(theta[run], held)
                inputs = [*replica.parameters, *leaves.values()]
                with eager.statistics.exposed(leaves):
                    value, found = _value(eager, queries, query, measurement, inputs, draws, where[run])
                values[run, place] = value
                size = len(replica.parameters)
                replica.layout.flatten(found[:size], out=gradients[run, place])
                for name, one in zip(names, found[size:], strict=True):
                    of_statistics[name][run, place] = one
    return values, gradients, of_statistics


def measure(
    eager: Eager, theta: Tensor, buffers: ByName, queries: Examples, measurement: Measurement, time: Time, draws: Draws
) -> Tensor:
    r"""Take a measurement of some models; the arguments are those of :func:`measure_with_gradients`.

    All models and queries are computed at once if the queries are tensors of one shape, and the measurement neither
    draws random numbers nor branches on values.

    Returns:
        The values :math:`m(\theta)` ``(runs, queries)``, which may not be finite.

    Raises:
        AttributionError: If the measurement fails.
    """
    replica = eager.replica
    with replica.generators.kept(), replica.passing(training=False):
        replica.trainer.time = time

        def one(run: int, query: int) -> float:
            replica.load(theta[run], {name: tensor[run] for name, tensor in buffers.items()})
            return _value(eager, queries, query, measurement, [], draws)[0]

        found = None if theta.shape[0] * len(queries) == 1 else _at_once(eager, theta, buffers, queries, measurement)
        if found is not None:
            scale = found[0].nan_to_num(0, 0, 0).abs().max()
            tolerance = tolerated(theta.dtype, theta.device)
            first = torch.full_like(found[0, 0], one(0, 0))
            if torch.isclose(found[0, 0], first, tolerance, float(tolerance * scale), equal_nan=True):
                return found
        return theta.new_tensor([[one(run, query) for query in range(len(queries))] for run in range(len(theta))])


def _at_once(
    eager: Eager, theta: Tensor, buffers: ByName, queries: Examples, measurement: Measurement
) -> Tensor | None:
    """Return the measurement of all models and queries ``(runs, queries)``; ``None`` if it cannot be vectorized."""
    leaves = queries.tensors(torch.arange(len(queries))[:, None])
    if leaves is None:
        return None
    replica, structure = eager.replica, tree_flatten(queries.collated([0]))[1]

    def of_one(theta: Tensor, buffers: ByName, leaves: list[Tensor]) -> Tensor:
        with replica.swapped(eager._parameters(theta), buffers):
            return measurement(replica.module, replica.moved(tree_unflatten(leaves, structure)))

    # the runs outside: otherwise each query would get a copy of all models' weights
    of_queries = vmap(of_one, in_dims=(None, None, 0), chunk_size=_QUERIES_AT_A_TIME)
    of_all = vmap(of_queries, in_dims=(0, 0, None))
    before = replica.generators.states()
    try:
        found: Tensor = of_all(theta, dict(buffers), leaves).detach()
    except Exception as error:  # the user's code may raise anything
        _log.info("The measurement is taken one model at a time: %s", str(error).strip().split("\n")[0])
        return None
    is_random = drawn_from(before, replica.generators.states())
    return None if is_random or found.shape != (len(theta), len(queries), 1) else found[..., 0]


def _taken(eager: Eager, queries: Examples, query: int, measurement: Measurement) -> Tensor:
    """Return a measurement of a query ``(1,)``; the loss in a batch of several copies if a batch of one fails."""

    def of(copies: int) -> Tensor:
        return measurement(eager.replica.module, eager.replica.moved(queries.collated([query] * copies)))

    try:
        return of(1)
    except Exception:  # a batch of one may fail in the user's code, usually because of a squeeze
        if measurement is not loss:
            raise
        two, three = of(2), of(3)
        tolerance = tolerated(eager.replica.dtype, eager.replica.device)
        if torch.isclose(two, three, tolerance, tolerance).all():
            return two
        if torch.isclose(two / 2, three / 3, tolerance, tolerance).all():
            return two / 2  # the loss is a sum over examples
        raise


@dataclass(frozen=True)
class Nature:
    """What the first value of a measurement shows about it.

    Args:
        is_random: Whether it draws random numbers.
        range: Values that it can take, as far as they are certain.
    """

    is_random: bool = False
    range: Range = EVERYTHING


def nature(eager: Eager, queries: Examples, measurement: Measurement, time: Time) -> Nature:
    """Take a measurement of the first query with the parameters that are loaded, to see what kind it is.

    Raises:
        AttributionError: If the measurement declares a range that is none.
    """
    replica = eager.replica
    with replica.generators.kept(), replica.passing(training=False):
        replica.trainer.time = time
        batch = queries.collated([0])
        before = replica.generators.states()
        try:
            value = measurement(replica.module, replica.moved(batch))
        except Exception:  # the failure is reported when the measurement is taken
            return Nature()
        return Nature(bool(drawn_from(before, replica.generators.states())), known_range(measurement, value))


def _value(
    eager: Eager,
    queries: Examples,
    query: int,
    measurement: Measurement,
    inputs: list[Tensor],
    draws: Draws,
    where: str | None = None,
) -> tuple[float, list[Tensor]]:
    """Return the measurement of one query and its derivatives, averaged over draws if it is random.

    If ``where`` is given, both must be finite.
    """
    replica = eager.replica
    seeds = draws.of(queries.first + query)
    total, sums = 0.0, [torch.zeros_like(one) for one in inputs]
    for number, seed in enumerate(seeds):
        replica.generators.seed(seed)
        before = replica.generators.states() if number == 0 else {}
        try:
            value = _taken(eager, queries, query, measurement)
            if value.shape != (1,):
                raise AttributionError(
                    f"The measurement returned shape {tuple(value.shape)} for one query. It must return shape (B,) for "
                    "a batch of B queries, here (1,)."
                )
            depends = inputs and value.requires_grad
            found = grad(value[0], inputs, allow_unused=True) if depends else [None] * len(inputs)
        except DTDAError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise AttributionError(
                f"The measurement fails ({error!r}). It is called with the module in evaluation mode and a batch of "
                "one query, which is collated and moved like a training batch. It must return a differentiable tensor "
                "of shape (B,)."
            ) from error
        gradients = [zeros(one, like) for one, like in zip(found, inputs, strict=True)]
        for what, parts in (("The measurement", [value]), ("The gradient of the measurement", gradients)):
            if where is not None and not bool(torch.isfinite(torch.stack([part.sum() for part in parts])).all()):
                raise AttributionError(
                    f"{what} is not finite at {where}. If the training diverged, exclude the run; otherwise choose a "
                    "measurement that is defined and differentiable there."
                )
        total += float(value.detach())
        if inputs:
            for summed, part in zip(sums, gradients, strict=True):
                summed.add_(part)
        if number == 0 and not drawn_from(before, replica.generators.states()):
            return total, sums
    return total / len(seeds), [one / len(seeds) for one in sums]
