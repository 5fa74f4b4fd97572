"""What the data did to the distribution of models: ``attribute``, ``Attribution``, ``suggest_removals``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.exporting import export
from lightning_dtda.attribution.suggesting import Suggestion, suggest_removals

if TYPE_CHECKING:
    from lightning_dtda.attribution.attributing import attribute, attribute_dampings
    from lightning_dtda.attribution.checking import check

__all__ = [
    "Attribution",
    "Suggestion",
    "attribute",
    "attribute_dampings",
    "check",
    "export",
    "suggest_removals",
]


def __getattr__(name: str) -> Any:
    # on first use: they import lightning, which takes seconds and which reading a stored attribution does not need
    if name in ("attribute", "attribute_dampings"):
        from lightning_dtda.attribution import attributing

        return getattr(attributing, name)
    if name == "check":
        from lightning_dtda.attribution import checking

        return checking.check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
