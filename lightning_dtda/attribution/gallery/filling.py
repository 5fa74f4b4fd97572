"""Which examples of an attribution are shown, and how: the way to its gallery."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeAlias

import msgspec
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.attribution.gallery.model_outputs import ModelOutputs
from lightning_dtda.attribution.gallery.pictures import as_image, figure_png
from lightning_dtda.attribution.gallery.showing import Vocabulary, bounded, show_item
from lightning_dtda.attribution.gallery.store import check_image
from lightning_dtda.attribution.tables import top_candidates
from lightning_dtda.errors import AttributionError
from lightning_dtda.replay import Examples, dataset_fingerprint, query_examples, query_names, training_examples

_log = logging.getLogger(__name__)

Show: TypeAlias = Callable[[Any], Any]
"""Takes an item of a data set; returns a :class:`Shown`, a PIL image, a tensor or array, text, a dictionary or a figure
of matplotlib or plotly."""

TOP = 5
"""Number of removals with the largest influence on a query, by each difference, that are in the gallery."""

MOST_QUERIES = 1000
"""Number of queries in the gallery."""

_MOST_EXAMPLES = 3000
"""Number of training examples in the gallery, which with thumbnails of usually 1 to 20 KB has at most about 80 MB."""

_MEMBERS = 4
"""Number of examples of a group that are in the gallery."""


@dataclass(frozen=True)
class Showing:
    """How the items of training examples and queries are shown.

    Args:
        training: The training examples, if they are at hand.
        queries: The queries, if they are at hand.
        known: A data module, or module, that may have names and a tokenizer, beside the data sets.
        show: The user's function; ``None`` to show the usual kinds of items.
        names: Names of the queries in their order; ``None`` for those of the data set.

    Raises:
        AttributionError: If the number of names differs from that of the queries, or ``show`` fails for the first item.
    """

    training: Examples | None
    queries: Examples | None
    known: tuple[Any, ...] = ()
    show: Show | None = None
    names: Sequence[str] | None = None
    _failures: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        names = self.names
        are_texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not are_texts:
            raise AttributionError(f"query_names={names!r}; give a list with a text for each query.")
        if names is not None and self.queries is not None and len(names) != len(self.queries):
            raise AttributionError(
                f"query_names has {len(names)} names for {len(self.queries)} queries. Give one for each, in order."
            )
        for what, examples, vocabulary in (
            ("training example", self.training, self.of_examples),
            ("query", self.queries, self.of_queries),
        ):
            if self.show is not None and examples is not None and len(examples):
                with isolate_rng():
                    self._by_user(self.show, _item(examples, 0), f"{what} 0", vocabulary)

    @cached_property
    def of_examples(self) -> Vocabulary:
        """Names that are known for the training examples."""
        return Vocabulary(*([] if self.training is None else [self.training.dataset]), *self.known)

    @cached_property
    def of_queries(self) -> Vocabulary:
        """Names that are known for the queries, or else for the training examples."""
        known = [examples.dataset for examples in (self.queries, self.training) if examples is not None]
        return Vocabulary(*known, *self.known)

    def example(self, index: int) -> Shown:
        """Show a training example."""
        assert self.training is not None
        return self._shown(self.training, self.of_examples, index, "training example")

    def query(self, position: int) -> Shown:
        """Show a query."""
        assert self.queries is not None
        shown = self._shown(self.queries, self.of_queries, position, "query")
        return shown if self.names is None else bounded(replace(shown, name=self.names[position]))

    def warn(self) -> None:
        """Warn of items that could not be shown as they should."""
        if self._failures:
            _log.warning(
                "%d items of the data are shown otherwise, or not at all. The first: %s",
                len(self._failures),
                self._failures[0],
            )

    def _shown(self, examples: Examples, vocabulary: Vocabulary, position: int, what: str) -> Shown:
        with isolate_rng():  # items may be random
            try:
                item = _item(examples, position)
            except Exception as error:  # the user's data set may raise anything; the work is not lost for a picture
                self._failures.append(f"The data set fails for {what} {position} ({error!r}).")
                return Shown()
            if self.show is not None:
                try:
                    return self._by_user(self.show, item, f"{what} {position}", vocabulary)
                except AttributionError as error:
                    self._failures.append(str(error))
            return show_item(item, vocabulary)

    @staticmethod
    def _by_user(show: Show, item: Any, which: str, vocabulary: Vocabulary) -> Shown:
        """Show an item by the user's function, with the name and label that the item has if it returns none.

        Raises:
            AttributionError: If it fails, or returns something else than it may.
        """
        where = f"show, for {which}, a {type(item).__name__},"
        remedy = "Return a Shown, a PIL image, a tensor or array, a text, a dictionary, or a figure."
        try:
            found = show(item)
            image = None if isinstance(found, (Shown, str, Mapping)) else figure_png(found)
        except Exception as error:  # the user's code may raise anything
            raise AttributionError(f"{where} fails ({error!r}). {remedy}") from error
        if isinstance(found, Shown):
            try:
                found = bounded(msgspec.convert(msgspec.to_builtins(found), Shown))
            except (msgspec.ValidationError, TypeError, ValueError) as error:
                raise AttributionError(f"{where} returns a Shown that is not valid: {error}. Correct it.") from error
            check_image(found.image, where, "Return the image itself, which is then made smaller.", AttributionError)
            return found
        if image is not None:
            check_image(image, where, "Make the figure smaller.", AttributionError)
            shown = Shown(image=image)
        elif isinstance(found, (str, Mapping)) or hasattr(found, "shape") or as_image(found) is not None:
            shown = show_item(found, vocabulary)
        else:
            raise AttributionError(f"{where} returns {found!r:.100}, a {type(found).__name__}. {remedy}")
        usual = show_item(item, vocabulary)
        return replace(shown, name=shown.name or usual.name, label=shown.label or usual.label)


def resolve_show(show: str | Show | None) -> Show | None:
    """Return the function that shows items.

    Args:
        show: The function or its import path.

    Raises:
        AttributionError: If there is none at the import path.
    """
    if not isinstance(show, str):
        found: Any = show
    else:
        module, _, name = show.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise AttributionError(
                f"show={show!r} is not the import path of a function ({error}). Give one such as my_module.show."
            ) from error
    if found is not None and not callable(found):
        raise AttributionError(f"show={show!r} is no function. Give a function of an item, or its import path.")
    return found


def gallery_of(
    attribution: Attribution,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any] | None = None,
    queries: DataLoader[Any] | Dataset[Any] | None = None,
    show: str | Show | None = None,
    examples: Iterable[int] | None = None,
) -> Gallery:
    """Make the gallery of an attribution afterwards.

    Args:
        attribution: The attribution. What its gallery has beyond this, such as the predictions, stays.
        data: As for :func:`~lightning_dtda.attribute`; ``None`` to show no training examples.
        queries: As for :func:`~lightning_dtda.attribute`; ``None`` to show no queries.
        show: As for :func:`~lightning_dtda.attribute`.
        examples: Indices of the training examples to show; ``None`` means those with the largest influences.

    Raises:
        AttributionError: If data or queries are not those of the attribution, or ``show`` fails for the first item.
    """
    training = None if data is None else training_examples(data)
    asked = None if queries is None else query_examples(queries, training)
    _refuse_others(attribution, training, asked)
    showing = Showing(training, asked, (data,), resolve_show(show))
    return filled(attribution, showing, examples=examples)


def filled(
    attribution: Attribution,
    showing: Showing,
    outputs: ModelOutputs | None = None,
    examples: Iterable[int] | None = None,
) -> Gallery:
    """Show queries and training examples of an attribution.

    Args:
        attribution: The attribution.
        showing: The items and how they are shown.
        outputs: What the trained models predict for the queries; ``None`` for what the present gallery says.
        examples: As for :func:`gallery_of`.
    """
    gallery = attribution.gallery
    shown_examples, shown_queries = dict(gallery.examples), dict(gallery.queries)
    if showing.training is not None:
        indices = most_influential(attribution) if examples is None else dict.fromkeys(examples)
        shown_examples |= {index: showing.example(index) for index in indices}
    if showing.queries is not None:
        positions = {name: position for position, name in enumerate(query_names(showing.queries))}
        runs, classes = attribution.trusted().runs, showing.of_queries.classes
        for name in attribution.queries[:MOST_QUERIES]:
            shown, before = showing.query(positions[name]), gallery.query(name)
            said = before.prediction if outputs is None else outputs.describe(positions[name], runs, classes)
            shown_queries[name] = replace(shown, name=shown.name or before.name, prediction=shown.prediction or said)
    showing.warn()
    return Gallery(shown_examples, shown_queries)


def most_influential(attribution: Attribution) -> list[int]:
    """Return the training examples with the largest influences on the queries, those of the first ranks first.

    For each query, these are the :data:`TOP` removals by each of :attr:`Attribution.available_differences`; of groups,
    the first members.
    """
    trusted, members = attribution.trusted(), attribution.members
    differences = [trusted._resolved(name) for name in trusted.available_differences]
    ranks: list[list[int]] = [[] for _ in range(TOP)]
    for query in range(min(len(trusted.queries), MOST_QUERIES)):
        of_query = trusted.select([query])
        for difference in differences:
            removals, influence = top_candidates(of_query, difference)
            largest = removals[influence.abs().argsort(descending=True)[:TOP]].tolist()
            for rank, removal in zip(ranks, largest, strict=False):
                rank += [removal] if members is None else members[removal][:_MEMBERS]
    return list(dict.fromkeys(chain.from_iterable(ranks)))[:_MOST_EXAMPLES]


def _item(examples: Examples, position: int) -> Any:
    """Read one item of a data set."""
    if not examples.takes_lists:
        return examples.dataset[position]
    return _alone(examples.dataset[[position]])


def _alone(batch: Any) -> Any:
    """Return the item of a batch of one."""
    if isinstance(batch, Mapping):
        return {key: _alone(value) for key, value in batch.items()}
    if isinstance(batch, list) and len(batch) == 1 and not hasattr(batch[0], "shape"):
        return batch[0]
    if isinstance(batch, (tuple, list)):
        return [_alone(part) for part in batch]
    return batch[0] if getattr(batch, "shape", ()) else batch


def _refuse_others(attribution: Attribution, training: Examples | None, queries: Examples | None) -> None:
    """Refuse data or queries that are not those of the attribution."""
    described = attribution.about.get("configuration", {}).get("dataset")
    trained_on = described.get("length") if isinstance(described, dict) else None
    if training is not None and trained_on is not None and trained_on != len(training):
        raise AttributionError(
            f"data has {len(training)} examples; the attribution's models were trained on {trained_on}. Give those."
        )
    asked = attribution.about.get("queries_fingerprint")
    if queries is not None and (
        not {*attribution.queries} <= {*query_names(queries)}
        or (asked is not None and asked != dataset_fingerprint(queries.dataset))
    ):
        raise AttributionError("queries are not those of the attribution. Give the same data set or loader.")
