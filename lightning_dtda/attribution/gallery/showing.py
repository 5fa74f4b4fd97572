"""Items of data sets as people see them, without the user's help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dtda.attribution.gallery import Shown
from lightning_dtda.attribution.gallery.pictures import as_image, thumbnail
from lightning_dtda.replay.measurements import LABELS

_NAMES = ("name", "id", "idx")
_IMAGES = ("image", "img", "pixel_values", "picture")
_TEXTS = ("text", "sentence", "sentence1", "question", "premise", "document", "content", "review")
_FEATURES = ("x", "features", "inputs", "input", "data")
_MASKS = ("attention_mask", "token_type_ids", "special_tokens_mask")
"""Keys of entries, in lower case; of several that an item has, the first is taken."""

_MOST_TEXT, _MOST_NAME, _MOST_VALUE = 1000, 100, 100
"""Largest number of characters of a text; of a name or label; of a feature's value."""

_MOST_FIELDS = 30
"""Number of features that are shown."""

_MOST_TOKENS = 500
"""Number of tokens that are decoded: more than :data:`_MOST_TEXT` characters."""

_SHORT = 8
"""Number of values that stand in a field one by one; longer vectors are described by type and shape."""


class Vocabulary:
    """What data sets, also below a ``Subset``, and data modules know of their items: names of classes and features.

    Args:
        *sources: Data sets, and data modules or modules; the first that knows a name decides.
    """

    def __init__(self, *sources: Any) -> None:
        self._sources = [layer for source in sources for layer in _layers(source)]

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, by number; empty if unknown."""
        for source in self._sources:
            for attribute in ("classes", "target_names"):
                if names := _texts(_attribute(source, attribute)):
                    return names
            if isinstance(features := _attribute(source, "features"), Mapping):  # of a Hugging Face data set
                for key in sorted(features, key=lambda key: key not in LABELS):
                    if names := _texts(_attribute(features[key], "names")):
                        return names
        return []

    def features(self, number: int) -> list[str]:
        """Return the names of a number of features; x1, x2 and so on if they are unknown."""
        for source in self._sources:
            for attribute in ("feature_names", "columns"):
                names = _texts(_attribute(source, attribute))
                if len(names) == number:
                    return names
        return [f"x{place}" for place in range(1, min(number, _MOST_FIELDS) + 1)]

    def decoded(self, tokens: Any) -> str | None:
        """Return the text of tokens; ``None`` without a tokenizer that can decode them."""
        for source in self._sources:
            decode = getattr(_attribute(source, "tokenizer"), "decode", None)
            if callable(decode):
                ids = [int(token) for token in tokens[:_MOST_TOKENS]]
                try:
                    return str(decode(ids, skip_special_tokens=True))
                except TypeError:  # the tokenizer has no such argument
                    return str(decode(ids))
        return None


def show_item(item: Any, vocabulary: Vocabulary | None = None) -> Shown:
    """Show an item of a data set.

    Tuples are an input, its label and more; of dictionaries, the keys decide. Images become thumbnails, features named
    fields, tokens text if there is a tokenizer, and other objects their attributes, or a short description.

    Args:
        item: The item, of any type.
        vocabulary: Names of classes and features.

    Example:
        >>> show_item((torch.tensor([0.5, 2.0]), 1))
        Shown(name=None, label='1', image=None, text=None, fields=(('x1', '0.5'), ('x2', '2')), prediction=None)
    """
    try:
        return bounded(_shown(item, vocabulary or Vocabulary()))
    except Exception:  # items are the user's objects, whose attributes may raise anything
        return bounded(Shown(text=_brief(item)))


def bounded(shown: Shown) -> Shown:
    """Shorten what is too long to show, and replace what is no Unicode text."""
    fields = [(_clipped(name, _MOST_NAME), _clipped(value, _MOST_VALUE)) for name, value in shown.fields[:_MOST_FIELDS]]
    if left := len(shown.fields) - len(fields):
        fields.append(("...", f"{left} more"))
    return replace(
        shown,
        name=_clipped(shown.name, _MOST_NAME),
        label=_clipped(shown.label, _MOST_NAME),
        text=_clipped(shown.text, _MOST_TEXT),
        fields=tuple(fields),
    )


def class_name(number: int, classes: Sequence[str]) -> str:
    """Return the name of a class, or its number."""
    return classes[number] if 0 <= number < len(classes) else str(number)


def _shown(item: Any, vocabulary: Vocabulary) -> Shown:
    if isinstance(item, str):
        return Shown(text=item)
    if isinstance(item, Mapping):
        return _of_entries(item, vocabulary)
    if hasattr(item, "_asdict"):  # a named tuple
        return _of_entries(item._asdict(), vocabulary)
    if isinstance(item, (tuple, list)) and not (len(item) > 2 and all(isinstance(one, Number) for one in item)):
        return _of_sequence(item, vocabulary)
    if (pixels := as_image(item)) is not None:
        return Shown(image=thumbnail(pixels))
    if (values := _vector(item)) is not None:
        text = None if values.is_floating_point() else vocabulary.decoded(values)
        return Shown(fields=_features(values, vocabulary)) if text is None else Shown(text=text)
    attributes = _attributes(item)
    return _of_entries(attributes, vocabulary, pictures=False) if attributes else Shown(text=_brief(item))


def _of_sequence(item: Sequence[Any], vocabulary: Vocabulary) -> Shown:
    """Show an input with a label and other columns; the input is the first image, text or dictionary, if any is."""
    if not item:
        return Shown()
    plain = [not isinstance(one, (str, Mapping, tuple, list)) and as_image(one) is None for one in item]
    place = plain.index(False) if False in plain else 0
    shown, fields = _shown(item[place], vocabulary), []
    for other in [*range(place + 1, len(item)), *range(place)]:  # a label usually follows its input
        text = _label(item[other], vocabulary)
        if text is not None and shown.label is None:
            shown = replace(shown, label=text)
        elif text is not None:
            fields.append((f"column {other}", _brief(item[other])))
    return replace(shown, fields=(*fields, *shown.fields))


def _of_entries(entries: Mapping[Any, Any], vocabulary: Vocabulary, pictures: bool = True) -> Shown:
    """Show named values; without ``pictures``, tensors are no images, since those of graphs are of the same shapes."""
    entries = {str(key): value for key, value in entries.items() if value is not None}
    parts: dict[str, Any] = {}
    fields: list[tuple[str, str]] = []
    keys = {kind: _first(entries, names) for kind, names in (("name", _NAMES), ("label", LABELS), ("text", _TEXTS))}
    for key, value in entries.items():
        lower = key.lower()
        pixels = as_image(value) if pictures or hasattr(value, "getbands") or lower in _IMAGES else None
        if key == keys["label"] and (label := _label(value, vocabulary)) is not None:
            parts["label"] = label
        elif key == keys["name"] and not isinstance(value, (Mapping, tuple)):
            parts["name"] = _brief(value)
        elif key == keys["text"] and isinstance(value, str):
            parts["text"] = value
        elif pixels is not None and "image" not in parts:
            parts["image"] = thumbnail(pixels)
        elif lower == "input_ids" and keys["text"] is None and (values := _vector(value)) is not None:
            parts["text"] = vocabulary.decoded(values) or " ".join(map(_brief, values[:_MOST_TOKENS]))
        elif lower in _FEATURES and (values := _vector(value)) is not None:
            fields.extend(_features(values, vocabulary))
        elif lower not in _MASKS:
            fields.append((key, _brief(value)))
    return Shown(**parts, fields=tuple(fields))


def _label(value: Any, vocabulary: Vocabulary) -> str | None:
    """Return the text of a label; ``None`` if the value is not like one."""
    if isinstance(value, str):
        return value
    values = _vector(value)
    if values is None:
        return None
    classes = vocabulary.classes
    if values.numel() == 1:
        is_number = values.is_floating_point() or values.dtype == torch.bool
        return _brief(values) if is_number else class_name(int(values), classes)
    if len(values) == len(classes) and bool(((values == 0) | (values == 1)).all()):  # one or several of the classes
        return ", ".join(name for name, chosen in zip(classes, values.tolist(), strict=True) if chosen)
    return _brief(values) if len(values) <= _SHORT else None


def _features(values: Tensor, vocabulary: Vocabulary) -> tuple[tuple[str, str], ...]:
    """Return names and values of features; those that are left out are empty, to be counted."""
    texts = [*map(_brief, values[:_MOST_FIELDS]), *[""] * (len(values) - _MOST_FIELDS)]
    names = vocabulary.features(len(values))
    return tuple(zip([*names, *[""] * (len(texts) - len(names))], texts, strict=True))


def _vector(value: Any) -> Tensor | None:
    """Return the numbers ``(n,)`` of a scalar, a list or a vector, also with axes of length one; else ``None``."""
    if isinstance(value, (bool, int, float, np.generic)):
        value = np.array(value)
    if isinstance(value, list) and value and all(isinstance(one, (bool, int, float)) for one in value):
        value = np.array(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "buif":
        value = torch.from_numpy(value.astype({"b": np.bool_, "f": np.float64}.get(value.dtype.kind, np.int64)))
    is_vector = isinstance(value, Tensor) and value.squeeze().ndim <= 1 and not value.is_complex()
    return value.detach().reshape(-1).cpu() if is_vector else None


def _brief(value: Any) -> str:
    """Describe a value in a few words."""
    with suppress(Exception):  # whatever is asked of the user's own class may fail
        if isinstance(value, str):
            return value
        if (values := _vector(value)) is not None and len(values) <= _SHORT:
            return ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in values.tolist())
        if isinstance(value, (Tensor, np.ndarray)):
            kind = str(value.dtype).removeprefix("torch.")
            return f"{kind} {' x '.join(map(str, value.shape))}"
        if type(value).__repr__ is not object.__repr__:  # not an address in memory
            return repr(value)
    return type(value).__name__


def _attributes(item: Any) -> dict[str, Any]:
    """Return the public attributes of an object: those that it lists itself, as a graph does, or its own."""
    listed = item.to_dict() if callable(getattr(item, "to_dict", None)) else getattr(item, "__dict__", {})
    return {name: value for name, value in listed.items() if not str(name).startswith("_") and not callable(value)}


def _layers(source: Any) -> Iterator[Any]:
    """Yield a data set and those that it is a part of."""
    seen: list[int] = []
    while source is not None and id(source) not in seen:
        seen.append(id(source))
        yield source
        source = _attribute(source, "dataset")


def _attribute(source: Any, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except Exception:  # the user's property may raise anything
        return None


def _texts(names: Any) -> list[str]:
    """Return names as texts; empty if they are none."""
    if hasattr(names, "tolist"):
        names = names.tolist()
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, (str, int)) for name in names)
    return [str(name) for name in names] if is_list else []


def _first(entries: Mapping[str, Any], names: Sequence[str]) -> str | None:
    lower = {key.lower(): key for key in entries}
    return next((lower[name] for name in names if name in lower), None)


def _clipped(text: Any, most: int) -> Any:
    """Shorten a text, and replace what no file can hold."""
    if not isinstance(text, str):
        return text
    text = text.encode(errors="replace").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."
