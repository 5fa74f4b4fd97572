"""The examples and queries of an attribution as people see them: pictures, texts, rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shown:
    """A training example or a query as people see it; parts that it does not have are ``None`` or empty.

    Args:
        name: Its name, such as an id of the data set. Without one, it is called by its index.
        label: Its label.
        image: A picture, as the bytes of a PNG file.
        text: A text.
        fields: Names and values of its features.
        prediction: What the trained models predict for it; for queries only.
    """

    name: str | None = None
    label: str | None = None
    image: bytes | None = None
    text: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    prediction: str | None = None


@dataclass(frozen=True)
class Gallery:
    """The examples and queries that can be shown.

    Args:
        examples: Training examples by index: those with the largest influences.
        queries: Queries by name, as in :attr:`Attribution.queries <lightning_dtda.Attribution.queries>`.
    """

    examples: Mapping[int, Shown] = field(default_factory=dict)
    queries: Mapping[int, Shown] = field(default_factory=dict)

    def example(self, index: int) -> Shown:
        """Return a training example, empty if it is not in the gallery."""
        return self.examples.get(index, Shown())

    def query(self, name: int) -> Shown:
        """Return a query, empty if it is not in the gallery."""
        return self.queries.get(name, Shown())
