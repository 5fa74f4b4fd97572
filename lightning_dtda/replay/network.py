"""The training loss as a network and a loss of its outputs: the two parts that the Gauss-Newton matrix is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.losses import batch_loss


def loss_of_one(module: LightningModule, batch: Any) -> Tensor:
    """Return the training loss of a batch of one example, a scalar."""
    own = getattr(module, "example_losses", None)
    return batch_loss(module, batch) if own is None else own(batch).reshape(())


class Network:
    r"""The part of a module between its inputs and its loss, :math:`l_n(\theta) = \ell_n(z_n(\theta))`.

    The network is the module itself where ``training_step`` calls ``self(inputs)``, else the submodule that holds all
    trained parameters; it must be called once for a loss, and return one tensor.

    Args:
        module: The user's module.
        batch: A batch of one example.
        parameters: Names of the trained parameters.
        name: The network's name among the module's submodules; ``None`` finds it.

    Raises:
        ReplayError: If there is no such submodule.
    """

    def __init__(
        self, module: LightningModule, batch: Any, parameters: tuple[str, ...], name: str | None = None
    ) -> None:
        calls = _calls(module, batch)
        if name is None:
            # parents come before their children
            holding = [found for found in calls if _holds(module, found, parameters)]
            name = next((found for found in holding if len(calls[found]) == 1), None)
        if name is None or len(calls.get(name, [])) != 1:
            raise ReplayError(
                f"{type(module).__name__} has no network to be seen: a (sub)module with all trained parameters that "
                f"training_step calls once{'' if name is None else f', as network={name!r}'}. The Gauss-Newton matrix "
                "is made of its outputs. Give network=..., the name of one, or another curvature."
            )
        if not isinstance(calls[name][0], Tensor):
            raise ReplayError(
                f"The network {name or type(module).__name__!r} returns {type(calls[name][0]).__name__}, not one "
                "tensor of outputs. Give network=..., the name of a submodule that does, or another curvature."
            )
        self.name = name
        self._shape = calls[name][0].shape
        self.outputs = calls[name][0].numel()
        """C, the number of outputs for an example."""
        prefix = f"{name}." if name else ""
        self._calls = {
            found.removeprefix(prefix): [result.numel() if isinstance(result, Tensor) else 0 for result in of_one]
            for found, of_one in calls.items()
        }

    def output(self, module: LightningModule, batch: Any) -> Tensor:
        """Return the outputs z for a batch of one ``(C,)``."""
        with _watched(module, [self.name]) as calls:
            loss_of_one(module, batch)
        result: Tensor = calls[self.name][0]
        return result.flatten()

    def loss_of_output(self, module: LightningModule, batch: Any, output: Tensor) -> Tensor:
        """Return the loss of a batch of one whose outputs are ``output`` ``(C,)``, a scalar."""
        with _replaced(module.get_submodule(self.name), output.reshape(self._shape)):
            return loss_of_one(module, batch)

    def calls_of(self, names: Sequence[str]) -> list[int]:
        """Return how often each of some submodules of the network is called for a loss."""
        return [len(self._calls.get(name, ())) for name in names]

    def sizes_of(self, names: Sequence[str]) -> list[int]:
        """Return how many outputs each of some submodules, which are called once, has for an example."""
        return [self._calls[name][0] for name in names]

    def output_and_inputs(
        self, module: LightningModule, batch: Any, names: Sequence[str], shifts: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs z for a batch of one ``(C,)``, and what some submodules are called with, each flat.

        Args:
            module: The module.
            batch: A batch of one.
            names: Of submodules of the network.
            shifts: What is added to the output of each, flat: zeros, by which to differentiate.
        """
        inputs: dict[str, Tensor] = {}
        network = module.get_submodule(self.name)

        def shifted(name: str, shift: Tensor) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
                inputs[name] = arguments[0].flatten()
                return result + shift.reshape(result.shape)

            return hook

        handles = [
            network.get_submodule(name).register_forward_hook(shifted(name, shift))
            for name, shift in zip(names, shifts, strict=True)
        ]
        try:
            output = self.output(module, batch)
        finally:
            for handle in handles:
                handle.remove()
        return output, [inputs[name] for name in names]

    def inputs(self, module: LightningModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that the network is called with for a whole batch, positional and by name."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def look(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append((positional, named))
            raise _SeenError

        handle = module.get_submodule(self.name).register_forward_pre_hook(look, with_kwargs=True)
        try:
            own = getattr(module, "example_losses", None)
            batch_loss(module, batch) if own is None else own(batch)
        except _SeenError:
            pass
        finally:
            handle.remove()
        return seen[0]


class _SeenError(Exception):
    """Ends a call of which no more than the network's arguments are wanted."""


def _holds(module: LightningModule, name: str, parameters: tuple[str, ...]) -> bool:
    """Say whether the trained parameters are all in the submodule, tied ones under any of their names."""
    of_module = dict(module.named_parameters(remove_duplicate=False))
    held = {id(parameter) for parameter in module.get_submodule(name).parameters()}
    return all(id(of_module[parameter]) in held for parameter in parameters)


def _calls(module: LightningModule, batch: Any) -> dict[str, list[Any]]:
    """Return what each submodule returns for a batch of one, call by call."""
    with torch.no_grad(), _watched(module, [name for name, _ in module.named_modules()]) as calls:
        loss_of_one(module, batch)
    return calls


@contextmanager
def _watched(module: nn.Module, names: list[str]) -> Iterator[dict[str, list[Any]]]:
    calls: dict[str, list[Any]] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, result, name=name: calls.setdefault(name, []).append(result)
        )
        for name in names
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(network: nn.Module, result: Tensor) -> Iterator[None]:
    """Let the network return a result without computing anything."""
    network.forward = lambda *_args, **_kwargs: result
    try:
        yield
    finally:
        del network.forward
