"""What the data did to the distribution of models: ``attribute``, ``Attribution``, differences, standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.differences import Difference, Mean, Variance, Wasserstein, jackknife

if TYPE_CHECKING:
    from lightning_dtda.attribution.attributing import attribute

__all__ = ["Attribution", "Difference", "Mean", "Variance", "Wasserstein", "attribute", "jackknife"]


def __getattr__(name: str) -> Any:
    # on first use: it imports lightning, which takes seconds and which reading a stored attribution does not need
    if name == "attribute":
        from lightning_dtda.attribution.attributing import attribute

        return attribute
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
