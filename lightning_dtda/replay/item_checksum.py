"""A checksum of what a data set returns for an example, whatever it is: equal for equal values, in every process."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import struct
import sys
from array import array
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Data types that NumPy has, by the size of an element: for those that it has not (bfloat16, float8)."""


def item_checksum(item: Any) -> int:
    """Return a 64-bit checksum of an item.

    Tensors and arrays count by data type, shape and values: memory layout, device and the storage around a view do not
    matter. Dictionaries and sets count without their order, images by their pixels, other objects by what pickle would
    keep of them, functions and classes by their names. Neither memory addresses nor ``cached_property`` enter, nor
    whether two parts of an item are one object. What pickle refuses (open files, locks, hundreds of objects in one
    another) counts by its class alone.

    Example:
        >>> item_checksum({"x": torch.ones(3), "y": 2}) == item_checksum({"y": 2, "x": torch.ones(6)[::2]})
        True
        >>> item_checksum((1, 2)) == item_checksum((2, 1))
        False
    """
    try:
        content = _Encoder().encode(item)
    except RecursionError:  # nor could pickle keep it
        content = _named(b"?", type(item))
    return int.from_bytes(_digest(content), "little", signed=True)


class _Encoder:
    """Turns one item into bytes. A container's are a digest of those of its parts, so that each is visited once."""

    def __init__(self) -> None:
        # the objects are kept, lest another one gets the id of one that is gone; None marks those that are being read
        self._seen: dict[int, tuple[Any, bytes | None]] = {}

    def encode(self, item: Any) -> bytes:
        """Return bytes of at most a few dozen, or as long as a string."""
        kind = type(item)
        if kind is str:
            return b"s" + _sized(item.encode("utf-8", "surrogatepass"))
        if kind is int:
            return b"i%d;" % item
        if kind is float:
            return b"f" + struct.pack("<d", item)
        if item is None or kind is bool:
            return b"1" if item else b"0" if item is False else b"n"
        if kind is bytes:
            return b"b" + _sized(item)
        known = self._seen.get(id(item))
        if known is not None:
            return known[1] or b"^"  # a part of itself
        self._seen[id(item)] = item, None
        content = self._container(item)
        self._seen[id(item)] = item, content
        return content

    def _container(self, item: Any) -> bytes:
        if isinstance(item, Tensor):
            return self._tensor(item)
        if isinstance(item, (np.ndarray, np.generic)):
            return self._array(item)
        if type(item) in (list, tuple):
            return (b"[" if type(item) is list else b"(") + self._sequence(item)
        if type(item) is dict:
            return b"{" + self._mapping(item)
        if isinstance(item, (set, frozenset)):
            return _named(b"*", type(item)) + _digest(*sorted(map(self.encode, item)))
        if isinstance(item, (type, FunctionType, BuiltinFunctionType, ModuleType)):
            return b"@" + _sized(getattr(item, "__qualname__", item.__name__).encode())
        image = getattr(sys.modules.get("PIL.Image"), "Image", None)
        if image is not None and isinstance(item, image):
            # where it was read from does not matter
            return b"P" + self._sequence([item.mode, item.size, item.getpalette(), item.tobytes()])
        return self._object(item)

    def _sequence(self, items: list[Any] | tuple[Any, ...]) -> bytes:
        # token ids and the like, many at once; what is too large for 64 bits one by one
        kinds = set(map(type, items))
        if kinds == {int} and max(items) < 2**63 and min(items) >= -(2**63):
            return b"q" + _digest(array("q", items).tobytes())
        if kinds == {float}:
            return b"d" + _digest(array("d", items).tobytes())
        return _digest(*map(self.encode, items))

    def _mapping(self, items: dict[Any, Any]) -> bytes:
        # sorted before the values are read: what is read first must not depend on the order
        keys = sorted(((self.encode(key), key) for key in items), key=lambda pair: pair[0])
        return _digest(*(part for encoded, key in keys for part in (encoded, self.encode(items[key]))))

    def _tensor(self, tensor: Tensor) -> bytes:
        try:
            values = tensor.numpy()  # most of them
        except (TypeError, RuntimeError):
            return self._other_tensor(tensor)
        return b"T" + _of_array(values)

    def _other_tensor(self, tensor: Tensor) -> bytes:
        """Encode a tensor that is not in the main memory, or that NumPy does not know as it is."""
        if tensor.is_nested:
            return b"N" + self._sequence(tensor.detach().unbind())
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass made of other tensors
            names, context = tensor.__tensor_flatten__()
            return _named(b"W", type(tensor)) + self._sequence([context, *(getattr(tensor, name) for name in names)])
        if type(tensor) is not Tensor:
            tensor = tensor.as_subclass(Tensor)
        tensor = tensor.detach()
        if tensor.is_quantized:
            return b"Q" + self._sequence([str(tensor.dtype), tensor.dequantize()])
        if tensor.layout != torch.strided or tensor.is_meta:
            return self._reduced(b"S", tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor)
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        try:
            return b"T" + _of_array(tensor.numpy())
        except TypeError:
            return b"T" + _sized(str(tensor.dtype).encode()) + _of_array(tensor.view(_OF_SIZE[tensor.itemsize]).numpy())

    def _array(self, values: Any) -> bytes:
        if isinstance(values, np.ma.MaskedArray):
            return b"M" + self._sequence([np.ma.getmaskarray(values), values.filled()])
        values = np.asarray(values)
        dtype = values.dtype
        if dtype.hasobject or dtype.kind == "T":  # pointers
            return b"O" + _digest(b"%r" % (values.shape,)) + self._sequence(values.reshape(-1).tolist())
        if dtype.names is not None:  # there may be gaps between the fields
            return b"R" + self._sequence([part for name in dtype.names for part in (name, values[name])])
        return b"A" + _of_array(values)

    def _object(self, item: Any) -> bytes:
        return self._reduced(_named(b"o", type(item)), item)

    def _reduced(self, tag: bytes, item: Any) -> bytes:
        """Encode what pickle would keep of an object."""
        try:
            reduce = copyreg.dispatch_table.get(type(item))
            reduced = item.__reduce_ex__(4) if reduce is None else reduce(item)
            if isinstance(reduced, str):
                return tag + _sized(reduced.encode())
            make, arguments, state, in_order, by_key = (*reduced, None, None, None)[:5]
            in_order, by_key = list(in_order or ()), dict(by_key or ())
        except RecursionError:
            raise
        except Exception:  # whatever an object that cannot be pickled does
            return tag + b"?"
        parts = [make, arguments, _without_caches(state, type(item)), in_order, by_key]
        # read here and not as a sequence, which would be a part of the item that is seen on its own
        return tag + _digest(*map(self.encode, parts))


def _without_caches(state: Any, kind: type) -> Any:
    """Leave out what a ``functools.cached_property`` has stored: it follows from the rest, once it was asked for."""
    if not isinstance(state, dict):
        return state
    return {
        name: value
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(getattr(kind, name, None), functools.cached_property))
    }


def _named(tag: bytes, kind: type) -> bytes:
    # without its module: a class of a script is in __main__ when it is run, and elsewhere when it is imported
    return tag + _sized(kind.__qualname__.encode())


def _of_array(values: Any) -> bytes:
    header = f"{values.dtype.str}{values.shape}"
    return hashlib.blake2b(header.encode() + values.tobytes(), digest_size=8).digest()


def _sized(content: bytes) -> bytes:
    return b"%d:%b" % (len(content), content)


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(map(_sized, parts)), digest_size=8).digest()
