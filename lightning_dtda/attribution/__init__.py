"""Attribution of a model distribution to its data: ``attribute``, ``Attribution``, ``suggest_removals``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.exporting import export
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.attribution.suggesting import Suggestion, suggest_removals

if TYPE_CHECKING:
    from lightning_dtda.attribution.attributing import attribute

__all__ = [
    "Attribution",
    "Gallery",
    "Shown",
    "Suggestion",
    "attribute",
    "export",
    "suggest_removals",
]


def __getattr__(name: str) -> Any:
    # imported on first use: lightning takes seconds to import, and reading a stored attribution does not need it
    if name == "attribute":
        from lightning_dtda.attribution import attributing

        return attributing.attribute
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
