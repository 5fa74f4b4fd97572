"""A copy of the user's module that runs as in training, but logs nothing and keeps no state between passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dtda.compatibility import (
    give_trainer,
    is_compiled,
    overrides,
    tree_leaves,
    twice_differentiable_weight_norm,
)
from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.batches import converted
from lightning_dtda.replay.kernels import WITH_SECOND_DERIVATIVES, enabled_kernels, using_kernels
from lightning_dtda.replay.random_states import DrawnIn, Generators
from lightning_dtda.replay.recurrent import twice_differentiable_recurrence
from lightning_dtda.replay.stand_ins import Circumstances, ReplayOptimizer, ReplayTrainer, Time
from lightning_dtda.trajectory import ParameterLayout

_AUTOCAST = {"bf16-mixed": torch.bfloat16}
"""Mixed precisions that are replayed with autocast. With ``16-mixed``, gradients were computed from a scaled loss; they
are recomputed in the precision of the parameters, where nothing overflows."""

_CAST = frozenset({"64-true", "bf16-true", "16-true"})
"""Precisions for which the Trainer casts the module and the batches."""

_ALIGNED = 16
"""Alignment in bytes of a tensor's start that the fastest GPU kernels require."""

_INTERNAL = frozenset({"_parameters", "_buffers", "_modules", "_trainer"})
"""Attributes of a module that :class:`_Memory` does not touch."""


class Replica:
    """A copy of the user's module into which parameters and buffers can be loaded, with a stand-in for the Trainer.

    ``training_step`` finds everything as it was in the training: the batch after the user's transfer hooks, the mode of
    each submodule, autocast, epoch and step, learning rates, and the states of the random number generators.

    Args:
        module: The user's module. Only its architecture matters; it is not modified, even while it is being trained.
        layout: Layout of the recorded parameters.
        circumstances: Circumstances of the training.
        dtype: Data type of the computation; floating-point buffers of the module are cast to it.
        device: Device of the computation.
        recorded_dtype: Data type of the training; ``dtype`` if not given.
        datamodule: Data module, whose transfer hooks take precedence over those of the module; ``None`` if there is
            none.

    Raises:
        ReplayError: If the module cannot be copied, or its parameters do not match the layout.
    """

    def __init__(
        self,
        module: LightningModule,
        layout: ParameterLayout,
        circumstances: Circumstances,
        dtype: torch.dtype,
        device: torch.device,
        recorded_dtype: torch.dtype | None = None,
        datamodule: Any = None,
    ) -> None:
        _check_parameters(module, layout)
        self.layout = layout
        self.dtype = dtype
        self.device = device
        self.circumstances = circumstances
        self.module = _copy(module)
        if any(self.module.get_parameter(name).dtype != dtype for name in layout.names):
            self.module.to(dtype)
        self.module.to(device).train()
        layers = dict(self.module.named_modules())
        if unknown := set(circumstances.evaluation_modules) - layers.keys():
            raise ReplayError(
                f"The recorded runs have a submodule {min(unknown)} that {type(module).__name__} lacks. Give a module "
                "of the class that was trained, created with the same arguments."
            )
        for name in circumstances.evaluation_modules:
            layers[name].eval()
        self.trainer = ReplayTrainer(circumstances.trainer)
        self.trainer.datamodule, self.trainer.lightning_module = datamodule, self.module
        give_trainer(self.module, self.trainer)
        for name in ("log", "log_dict", "print"):
            setattr(self.module, name, _nothing)
        self.module.optimizers = self._optimizers  # type: ignore[method-assign,assignment]
        self.module.lr_schedulers = self._optimizers  # type: ignore[method-assign,assignment]
        self.generators = Generators(self.module, device)
        self._recorded_dtype = recorded_dtype or dtype
        self._hooks = _transfer_hooks(self.module, datamodule, circumstances)
        parameters = dict(self.module.named_parameters())
        self.parameters = [parameters[name].requires_grad_() for name in layout.names]
        self._strides = [parameter.stride() for parameter in self.parameters]
        self._frozen = {name: one for name, one in parameters.items() if name not in set(layout.names)}
        for parameter in self._frozen.values():
            parameter.requires_grad_(False)
        self._owners = {name: _owner(self.module, name) for name, _ in self.module.named_buffers()}
        of_parameters = {id(one): name for name, one in parameters.items()}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        for name, one in self.module.named_parameters(remove_duplicate=False):
            self._places.setdefault(of_parameters[id(one)], []).append(_owner(self.module, name))
        self._updated = set(circumstances.updated_buffers)
        self._metrics = [layer for layer in self.module.modules() if isinstance(layer, Metric)]
        self._memory = _Memory(self.module)
        self.metrics_count = True
        """Whether torchmetrics run unchanged, since the loss may be one. Set to false if they do not affect it."""
        self._parameter_dtype_differs = self._recorded_dtype != dtype

    # -- loading parameters and buffers

    def load(self, theta: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Load parameters ``(P,)``, and buffers and frozen parameters by name; those not named keep their values."""
        parts = self.layout.unflatten(theta).values()
        for parameter, stride, part in zip(self.parameters, self._strides, parts, strict=True):
            parameter.data = self._placed(part, stride)
        for name, tensor in buffers.items():
            if name in self._frozen:
                self._frozen[name].data = tensor
        for where, key, tensor in self._buffer_places(buffers):
            where[key] = tensor

    def _placed(self, part: Tensor, stride: tuple[int, ...]) -> Tensor:
        """Return a parameter in the memory layout of the training; in another one, kernels may round differently."""
        is_aligned = self.device.type == "cpu" or part.data_ptr() % _ALIGNED == 0
        if is_aligned and part.stride() == stride:
            return part
        return torch.empty_strided(part.shape, stride, dtype=part.dtype, device=part.device).copy_(part)

    def _buffer_places(self, buffers: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Yield the place of each buffer and its new value, cloned if a pass changes it in place."""
        for name, tensor in buffers.items():
            if name in self._owners:
                owner, key = self._owners[name]
                yield owner._buffers, key, tensor.clone() if name in self._updated else tensor

    @contextmanager
    def swapped(self, parameters: Sequence[Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters (in the layout's order), buffers and frozen parameters inside this context."""
        tensors = dict(zip(self.layout.names, parameters, strict=True)) | {
            name: tensor for name, tensor in buffers.items() if name in self._frozen
        }
        places: list[tuple[dict[str, Any], str, Tensor]] = [
            (owner._parameters, key, tensor) for name, tensor in tensors.items() for owner, key in self._places[name]
        ]
        places += self._buffer_places(buffers)
        kept = [(where, key, where[key]) for where, key, _ in places]
        try:
            for where, key, tensor in places:
                where[key] = tensor
            yield
        finally:
            for where, key, own in kept:
                where[key] = own

    def buffers(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named buffers as they are after the last pass."""
        return {name: owner._buffers[key] for name in names for owner, key in [self._owners[name]]}  # type: ignore[misc]

    def keeping_buffers(self) -> AbstractContextManager[None]:
        """Restore the buffers at the end, whatever runs inside."""
        return self.swapped(self.parameters, self.buffers(self._updated))

    # -- running the module

    @contextmanager
    def passing(self, *, training: bool = True, twice: bool = True) -> Iterator[None]:
        """Run the module under the conditions of the training, then undo the changes that it made to itself.

        Args:
            training: Whether to run in training mode; else in evaluation mode.
            twice: Whether the computation will be differentiated twice, which not all kernels of the training support.
        """
        modes = [] if training else [layer for layer in self.module.modules() if layer.training]
        kernels = set(enabled_kernels() if self.circumstances.kernels is None else self.circumstances.kernels)
        if twice:
            kernels &= WITH_SECOND_DERIVATIVES
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(using_kernels(kernels))
            if twice:
                stack.enter_context(twice_differentiable_weight_norm())
                stack.enter_context(twice_differentiable_recurrence())
            # compiled code has no second derivative
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if (mixed := _AUTOCAST.get(self.circumstances.precision)) is not None and not self._parameter_dtype_differs:
                stack.enter_context(torch.autocast(self.device.type, mixed, cache_enabled=False))
            if self._is_converted:
                stack.enter_context(_default_dtype(self.dtype))
            if self._parameter_dtype_differs:
                stack.enter_context(DrawnIn(self._recorded_dtype, self.dtype))
            if not self.metrics_count:
                stack.enter_context(_silenced(self._metrics))
            for layer in modes:
                layer.training = False
            self.trainer.training, self.trainer.validating = training, not training
            try:
                yield
            finally:
                for layer in modes:
                    layer.training = True
                self.trainer.training, self.trainer.validating = True, False
                self._memory.restore()
                for metric in self._metrics if self.metrics_count else ():
                    metric.reset()

    def training_loss(self, batch: Any, time: Time, states: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss that ``training_step`` returns for a collated batch. Call it inside :meth:`passing`.

        Args:
            batch: Batch as returned by the ``collate_fn``.
            time: Time of the training.
            states: States of the random number generators to restore first; ``None`` to leave them unchanged.
        """
        self.trainer.time = time
        module = self.module
        if module.training and overrides(module, "on_train_epoch_start"):
            module.on_train_epoch_start()
        if states is not None:
            self.generators.set(states)
        with nullcontext() if states is None else self.generators.refusing_other_devices(states):
            batch = self.moved(batch)
            if module.training and overrides(module, "on_train_batch_start"):
                module.on_train_batch_start(batch, time.batch_idx)
            return step_loss(module, batch, time.batch_idx)

    def moved(self, batch: Any) -> Any:
        """Prepare a collated batch for ``training_step``: precision, the user's transfer hooks, device."""
        if self._is_converted:
            batch = converted(batch, self.dtype)
        before, transfer, after = self._hooks
        return after(transfer(before(batch, 0), self.device, 0), 0)

    @property
    def _is_converted(self) -> bool:
        """Whether floating-point tensors of a batch are cast."""
        return self._parameter_dtype_differs or self.circumstances.precision in _CAST

    def _optimizers(self, *args: Any, **kwargs: Any) -> ReplayOptimizer:
        return ReplayOptimizer(self.trainer.time.hyperparameters)


def step_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """Return the loss that ``training_step`` returns for a batch, a scalar."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ReplayError(
            f"{type(module).__name__}.training_step returned {type(output).__name__}. It must return the loss: a "
            'tensor with a single number, or a dict with that tensor under "loss".'
        )
    return loss.reshape(())


class _Memory:
    """The attributes of a module before a pass, to undo changes such as appending to a list or storing a loss.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._collections: list[tuple[Any, Any]] = []
        for layer in module.modules():
            kept = {name: value for name, value in vars(layer).items() if name not in _INTERNAL}
            self._attributes.append((vars(layer), kept))
            self._collections += [
                (value, copy.copy(value)) for name, value in kept.items() if _is_remembered(name, value)
            ]

    def restore(self) -> None:
        """Restore the attributes of the module."""
        for attributes, kept in self._attributes:
            if len(attributes) != len(kept) + len(_INTERNAL & attributes.keys()):
                for name in attributes.keys() - kept.keys() - _INTERNAL:
                    del attributes[name]
            for name, value in kept.items():
                if attributes.get(name) is not value:
                    attributes[name] = value
        for collection, content in self._collections:
            collection.clear()
            collection.update(content) if isinstance(content, (dict, set)) else collection.extend(content)


def _is_remembered(name: str, value: Any) -> bool:
    return type(value) in (list, dict, set) and not name.startswith("_")


def _copy(module: LightningModule) -> LightningModule:
    # tensors with a graph, which a training may have left behind, cannot be copied
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for leaf in tree_leaves({k: v for k, v in vars(layer).items() if k not in ("_modules", "_parameters")}):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                memo[id(leaf)] = leaf.detach()
    try:
        copied: LightningModule = copy.deepcopy(module, memo)
    except Exception as error:
        raise ReplayError(
            f"{type(module).__name__} cannot be copied ({error}). Keep objects that cannot be copied (locks, open "
            "files) out of the module, or define __deepcopy__."
        ) from error
    for name in ("training_step", "forward"):  # compiled by torch.compile(module); the class has the originals
        if is_compiled(copied):
            vars(copied).pop(name, None)
    return copied


def _transfer_hooks(module: LightningModule, datamodule: Any, circumstances: Circumstances) -> list[Callable[..., Any]]:
    """Return the three transfer hooks of a batch, each that of the data module or of the module, as in Lightning."""
    hooks = []
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        owner = circumstances.transfer_hooks.get(name, "module")
        if owner == "datamodule" and datamodule is None:
            raise ReplayError(
                f"The training transformed its batches with {name} of a data module. Give that data module as data."
            )
        hooks.append(getattr(datamodule if owner == "datamodule" else module, name))
    return hooks


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


@contextmanager
def _silenced(metrics: Sequence[Metric]) -> Iterator[None]:
    for metric in metrics:
        vars(metric).update(forward=_zero, update=_zero, compute=_zero, reset=_nothing)
    try:
        yield
    finally:
        for metric in metrics:
            for name in ("forward", "update", "compute", "reset"):
                vars(metric).pop(name, None)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())


def _check_parameters(module: LightningModule, layout: ParameterLayout) -> None:
    found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in found:
            raise ReplayError(
                f"The recorded runs have a parameter {name} that {type(module).__name__} lacks. Give a module of the "
                "class that was trained, created with the same arguments."
            )
        if found[name] != shape:
            raise ReplayError(
                f"Parameter {name} has shape {found[name]} in this {type(module).__name__} and {shape} in the "
                "recorded runs. Create the module with the arguments that it was trained with."
            )


def buffers(module: LightningModule, layout: ParameterLayout, step: int) -> dict[str, Tensor]:
    """Return the buffers, and at the start the frozen parameters, which no later checkpoint repeats."""
    found = dict(module.named_buffers())
    if step == 0:
        trained = set(layout.names)
        found |= {name: p.detach() for name, p in module.named_parameters() if name not in trained}
    return found
