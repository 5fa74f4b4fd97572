"""Dropout, replayed: the masks that a recorded step drew, given to the examples one by one.

A mask is drawn for a whole batch, from a recorded state of the random number generator. To differentiate the loss of a
single example, its part of each mask is needed. So the functions that draw are intercepted where the module calls them:
once to learn in which order and for which shapes it does, then to put in masks that were drawn from the record.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.random_states import kept_random_states, random_states, set_random_states

_LINEAR = ("dropout", "dropout1d", "dropout2d", "dropout3d")
_AFFINE = ("alpha_dropout", "feature_alpha_dropout")
_ATTENTION = "scaled_dot_product_attention"

Mask: TypeAlias = tuple[Tensor, ...]
"""What a dropout function does to its argument, for each example ``(B, ...)``: a factor, and for alpha dropout a
summand."""


@dataclass(frozen=True)
class DropoutCall:
    """One call of a dropout function.

    Args:
        function: Its name in ``torch.nn.functional``.
        p: Probability.
        shape: Of its argument for a batch of one example.
        axis: The dimension along which the argument of a batch is longer; ``None`` where it is not, and the examples
            share one mask (dropout of weights).
        order: Dimensions of the argument from the slowest to the fastest in memory: masks are drawn in that order.
    """

    function: str
    p: float
    shape: tuple[int, ...]
    axis: int | None
    order: tuple[int, ...]

    def draw(self, examples: int, device: torch.device, dtype: torch.dtype) -> Mask:
        """Draw the mask of a batch from the generator as it is now, each part ``(examples, *shape)``."""
        shape = list(self.shape)
        if self.axis is not None:
            shape[self.axis] *= examples
        ones = torch.ones([shape[d] for d in self.order], device=device, dtype=dtype)
        ones = ones.permute([self.order.index(d) for d in range(len(shape))])
        function = getattr(functional, self.function)
        if self.function in _LINEAR:
            return (self._of_examples(function(ones, self.p, True), examples),)
        before = random_states(device)
        summand = function(torch.zeros_like(ones), self.p, True)
        set_random_states(before, device)
        factor = function(ones, self.p, True) - summand
        return self._of_examples(factor, examples), self._of_examples(summand, examples)

    def of_batch(self, mask: Mask) -> Mask:
        """Put the masks of examples, each part ``(examples, *shape)``, together to that of their batch."""
        if self.axis is None:
            return tuple(part[0] for part in mask)
        axis = self.axis
        return tuple(part.movedim(0, axis).flatten(axis, axis + 1) for part in mask)

    def _of_examples(self, mask: Tensor, examples: int) -> Tensor:
        if self.axis is None:
            return mask.expand(examples, *mask.shape)
        return mask.unflatten(self.axis, (examples, self.shape[self.axis])).movedim(self.axis, 0)


@dataclass(frozen=True)
class Dropout:
    """All dropout of one pass through a module, in the order in which it happens.

    Args:
        calls: The calls.
        dtype: In which the masks were drawn.
        device: On which they were drawn.
    """

    calls: tuple[DropoutCall, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def trace(
        cls,
        of_batch: Callable[[], object],
        of_example: Callable[[], object],
        examples: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Dropout:
        """Learn what a module draws.

        Args:
            of_batch: Passes a batch through the module.
            of_example: Passes its first example through the module.
            examples: Size of the batch, at least 2.
            dtype: Of the training, in which masks are drawn.
            device: The module's.

        Raises:
            ReplayError: If the masks of single examples cannot be told from those of the batch, or other random
                numbers are drawn than those of dropout.
        """
        with kept_random_states(device):
            before = random_states(device)
            batched = _observe(of_batch)
            after = random_states(device)
            if all(torch.equal(before[kind], after[kind]) for kind in before):
                return NO_DROPOUT
            try:
                single = _observe(of_example)
            except Exception as error:  # whatever the user's code does with a batch of one
                raise ReplayError(
                    f"A module with dropout has to take a batch of one example, and this one fails ({error!r})."
                ) from error
            if [call[:2] for call in batched] != [call[:2] for call in single]:
                raise ReplayError(
                    f"training_step calls dropout {len(batched)} times for a batch and {len(single)} times, or with "
                    "other probabilities, for a single example, so that its masks cannot be replayed."
                )
            calls = tuple(
                DropoutCall(name, p, tuple(one.shape), _axis(batch.shape, one.shape, examples), _order(batch))
                for (name, p, batch), (_, _, one) in zip(batched, single, strict=True)
            )
            dropout = cls(calls, dtype, device)
            set_random_states(before, device)
            for call in calls:
                call.draw(examples, device, dtype)
            drawn = random_states(device)
        if any(not torch.equal(after[kind], drawn[kind]) for kind in after):
            raise ReplayError(
                "training_step draws random numbers other than those of torch.nn.functional's dropout, which the loss "
                "of a single example cannot draw again. Draw them in the data set, or leave them out."
            )
        return dropout

    def draw(self, states: dict[str, Tensor], examples: int, dtype: torch.dtype) -> list[Mask]:
        """Draw the masks of a batch, each part ``(examples, ...)``, from recorded states of the generators."""
        with kept_random_states(self.device):
            set_random_states(states, self.device)
            masks = [call.draw(examples, self.device, self.dtype) for call in self.calls]
        return [tuple(part.to(dtype) for part in mask) for mask in masks]

    def for_batch(self, masks: Sequence[Mask]) -> Any:
        """Return a context in which a batch passes through the module with masks, each part ``(B, ...)``."""
        return (
            nullcontext()
            if not self.calls
            else _replayed([call.of_batch(mask) for call, mask in zip(self.calls, masks, strict=True)])
        )

    def for_example(self, masks: Sequence[Mask]) -> Any:
        """Return a context in which one example passes through the module with its masks, without a ``B``."""
        return nullcontext() if not self.calls else _replayed(masks)


NO_DROPOUT = Dropout((), torch.float32, torch.device("cpu"))
"""Nothing is intercepted, nothing drawn."""


@contextmanager
def _replayed(masks: Sequence[Mask]) -> Iterator[None]:
    waiting = list(masks)

    def put_in(name: str, p: float, argument: Tensor) -> Tensor:
        if not waiting or waiting[0][0].shape != argument.shape:
            raise ReplayError(
                f"training_step calls {name} for a tensor of shape {tuple(argument.shape)} where the recorded step did "
                "not. Let it take the same way for every batch."
            )
        factor, *summand = waiting.pop(0)
        return argument * factor + summand[0] if summand else argument * factor

    with _intercepted(put_in):
        yield
    if waiting:
        raise ReplayError(
            f"The loss of single examples calls dropout {len(waiting)} times less than the recorded step did. Let "
            "example_losses draw what training_step draws."
        )


def _observe(function: Callable[[], object]) -> list[tuple[str, float, Tensor]]:
    """Call a function and return name, probability and argument of every dropout on the way."""
    calls: list[tuple[str, float, Tensor]] = []

    def note(name: str, p: float, argument: Tensor) -> Tensor:
        calls.append((name, p, argument))
        result: Tensor = originals[name](argument, p, True)
        return result

    originals = {name: getattr(functional, name) for name in (*_LINEAR, *_AFFINE)}
    with _intercepted(note):
        function()
    return calls


@contextmanager
def _intercepted(handle: Callable[[str, float, Tensor], Tensor]) -> Iterator[None]:
    """Let ``handle`` do the dropout that ``torch.nn.functional`` is called for, and attention by its definition.

    The functions are exchanged in their module. A ``TorchFunctionMode`` does not see the dropout inside
    ``multi_head_attention_forward``, since it is switched off while that function runs.
    """
    originals = {name: getattr(functional, name) for name in (*_LINEAR, *_AFFINE, _ATTENTION)}

    def dropout(name: str) -> Callable[..., Tensor]:
        signature = inspect.signature(originals[name])

        def function(*args: Any, **kwargs: Any) -> Tensor:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            argument, p = arguments.arguments["input"], arguments.arguments["p"]
            if not arguments.arguments["training"] or p == 0:
                result: Tensor = argument
                return result
            return handle(name, p, argument)

        return function

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if p == 0:
            result: Tensor = originals[_ATTENTION](*args, **kwargs)
            return result
        return _attention(lambda weights: handle("dropout", p, weights), *args, **kwargs)

    try:
        for name in (*_LINEAR, *_AFFINE):
            setattr(functional, name, dropout(name))
        setattr(functional, _ATTENTION, attention)
        yield
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


def _attention(
    dropout: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention as its documentation defines it, with the dropout of its weights taken out."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return dropout(scores.softmax(-1)) @ value


def _axis(batch: Sequence[int], one: Sequence[int], examples: int) -> int | None:
    """Return the dimension along which the examples of a batch lie."""
    if tuple(batch) == tuple(one):
        return None
    longer = [d for d, (many, single) in enumerate(zip(batch, one, strict=False)) if many != single]
    if len(batch) != len(one) or len(longer) != 1 or batch[longer[0]] != examples * one[longer[0]]:
        raise ReplayError(
            f"Dropout of a tensor of shape {tuple(batch)} for {examples} examples and {tuple(one)} for one: which part "
            "belongs to which example cannot be told."
        )
    return longer[0]


def _order(tensor: Tensor) -> tuple[int, ...]:
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda d: -strides[d]))
