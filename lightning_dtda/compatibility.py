"""Every dependence on a private name of torch or Lightning, each with an error that says what is missing."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dtda.errors import ReplayError

_KNOWN = "torch 2.4 to 2.13 and lightning 2.5 to 2.6"
"""Versions with which these names are known to be there."""


def missing(what: str, error: BaseException) -> str:
    """Return what an error says where a private name is gone."""
    return (
        f"{what} is not where it was: this is torch {torch.__version__} and lightning {pl.__version__} ({error!r}). "
        f"Install versions that lightning-dtda knows: {_KNOWN}."
    )


def shapes_out_of(node: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a node of autograd's graph stands for.

    Raises:
        ReplayError: If this version of torch keeps them elsewhere.
    """
    try:
        return [tuple(metadata.shape) for metadata in node._input_metadata]
    except AttributeError as error:
        raise ReplayError(missing("What autograd knows of a tensor's shape", error)) from error


def is_a(value: object, name: str) -> bool:
    """Whether something is an instance of a class of Lightning's, under either of the two names that it is installed by.

    ``lightning.pytorch`` and ``pytorch_lightning`` are the same code, but their classes are not the same.

    Args:
        value: Anything.
        name: Of the class, with the module below either package where it is not at the top: ``callbacks.Timer``.
    """
    return isinstance(value, kinds(name))


def kinds(*names: str) -> tuple[type, ...]:
    """Return classes of Lightning's by their names, as :func:`is_a` takes them, from both packages as far as they are in use.

    A name that a version does not have stands for no class.
    """
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        for name in names:
            value: Any = sys.modules.get(package)
            for part in name.split("."):
                value = getattr(value, part, None)
            if isinstance(value, type):
                found.append(value)
    return tuple(found)


def overrides(instance: object, hook: str) -> bool:
    """Whether a module, a data module or a callback has a hook of its own, in place of the one that Lightning gives it."""
    if hook in getattr(instance, "__dict__", {}):
        return True
    own = getattr(type(instance), hook, None)
    if own is None:
        return False
    bases = kinds("LightningModule", "LightningDataModule", "Callback")
    return not any(own is getattr(base, hook, None) for base in bases)
