"""Per-example training losses of an unmodified LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.batches import map_tensors
from lightning_dtda.replay.dropout import NO_DROPOUT, Dropout, Mask


def example_losses(
    module: LightningModule, batch: Any, batch_idx: int = 0, dropout: Dropout = NO_DROPOUT, masks: Sequence[Mask] = ()
) -> Tensor:
    r"""Return :math:`l_n(\theta)` for every example of a batch ``(B,)``.

    From the module's own ``example_losses(batch)`` where it defines one; else ``training_step``, mapped over batches
    of a single example.

    Args:
        module: The module.
        batch: B examples.
        batch_idx: As ``training_step`` gets it.
        dropout: What the module draws.
        masks: What it drew for this batch, each part ``(B, ...)``.

    Raises:
        ReplayError: If ``training_step`` cannot be mapped, or the losses do not have shape ``(B,)``.
    """
    if (own := getattr(module, "example_losses", None)) is not None:
        with dropout.for_batch(masks):
            losses: Tensor = own(batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ReplayError(
                f"{type(module).__name__}.example_losses must return a tensor of shape (B,), not {shape}."
            )
        return losses

    def of_one(row: Any, masks: Sequence[Mask]) -> Tensor:
        with dropout.for_example(masks):
            return batch_loss(module, map_tensors(lambda leaf: leaf.unsqueeze(0), row), batch_idx)

    try:
        return torch.func.vmap(of_one)(batch, list(masks))
    except ReplayError:
        raise
    except Exception as error:  # whatever the user's code does with a batch of one
        raise ReplayError(
            f"{type(module).__name__}.training_step cannot be run one example at a time ({error!r}). Leave "
            "out what needs numbers instead of tensors (.item(), float(), print, a branch on a value), or define "
            "example_losses(batch) -> (B,) on the module: the loss of each example of the batch."
        ) from error


def batch_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """Return the loss that ``training_step`` returns for a batch, a scalar."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ReplayError(
            f"{type(module).__name__}.training_step returned {type(output).__name__}, not a loss (a tensor, or a dict "
            'with the tensor "loss").'
        )
    return loss.reshape(())
