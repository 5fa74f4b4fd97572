"""A checksum of any item that a data set returns: the same for equal values, in every process."""

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
"""Data types known to NumPy, by element size, as which to view those unknown to it (bfloat16, float8)."""


def item_checksum(item: Any) -> int:
    """Return a 64-bit checksum of an item.

    Tensors and arrays are identified by data type, shape and values; memory layout, device and the storage around a
    view do not matter. Dictionaries and sets are compared regardless of order, images by their pixels, functions and
    classes by name, and other objects by what pickle would store. Memory addresses, the values of ``cached_property``,
    and whether two parts of an item are the same object have no influence. Objects that cannot be pickled (open files,
    locks, objects nested hundreds of levels deep) are identified by their class alone.

    Example:
        >>> item_checksum({"x": torch.ones(3), "y": 2}) == item_checksum({"y": 2, "x": torch.ones(6)[::2]})
        True
        >>> item_checksum((1, 2)) == item_checksum((2, 1))
        False
    """
    try:
        content = _Encoder().encode(item)
    except RecursionError:  # pickle would fail as well
        content = _named(b"?", type(item))
    return int.from_bytes(_digest(content), "little", signed=True)


class _Encoder:
    """Turns one item into bytes. Those of a container are a digest of its parts, so each part is visited once."""

    def __init__(self) -> None:
        # holding the objects prevents their ids from being reused; None marks those that are being encoded
        self._seen: dict[int, tuple[Any, bytes | None]] = {}

    def encode(self, item: Any) -> bytes:
        """Return at most a few dozen bytes, or about as many as the string or bytes to encode."""
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
            return known[1] or b"^"  # the item contains itself
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
            # the file that it was read from does not matter
            return b"P" + self._sequence([item.mode, item.size, item.getpalette(), item.tobytes()])
        return self._object(item)

    def _sequence(self, items: list[Any] | tuple[Any, ...]) -> bytes:
        # lists of numbers, such as token ids, in one go; integers that do not fit 64 bits one by one
        kinds = set(map(type, items))
        if kinds == {int} and max(items) < 2**63 and min(items) >= -(2**63):
            return b"q" + _digest(array("q", items).tobytes())
        if kinds == {float}:
            return b"d" + _digest(array("d", items).tobytes())
        return _digest(*map(self.encode, items))

    def _mapping(self, items: dict[Any, Any]) -> bytes:
        # keys are sorted before any value is encoded, so that the encoding does not depend on their order
        keys = sorted(((self.encode(key), key) for key in items), key=lambda pair: pair[0])
        return _digest(*(part for encoded, key in keys for part in (encoded, self.encode(items[key]))))

    def _tensor(self, tensor: Tensor) -> bytes:
        try:
            values = tensor.numpy()  # works for most tensors
        except (TypeError, RuntimeError):
            return self._other_tensor(tensor)
        return b"T" + _of_array(values)

    def _other_tensor(self, tensor: Tensor) -> bytes:
        """Encode a tensor that is not in main memory, or that NumPy cannot represent directly."""
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
        if dtype.hasobject or dtype.kind == "T":  # the memory holds pointers
            return b"O" + _digest(b"%r" % (values.shape,)) + self._sequence(values.reshape(-1).tolist())
        if dtype.names is not None:  # there may be padding between the fields
            return b"R" + self._sequence([part for name in dtype.names for part in (name, values[name])])
        return b"A" + _of_array(values)

    def _object(self, item: Any) -> bytes:
        return self._reduced(_named(b"o", type(item)), item)

    def _reduced(self, tag: bytes, item: Any) -> bytes:
        """Encode what pickle would store of an object."""
        try:
            reduce = copyreg.dispatch_table.get(type(item))
            reduced = item.__reduce_ex__(4) if reduce is None else reduce(item)
            if isinstance(reduced, str):
                return tag + _sized(reduced.encode())
            make, arguments, state, in_order, by_key = (*reduced, None, None, None)[:5]
            in_order, by_key = list(in_order or ()), dict(by_key or ())
        except RecursionError:
            raise
        except Exception:  # objects that cannot be pickled may raise anything
            return tag + b"?"
        parts = [make, arguments, _without_caches(state, type(item)), in_order, by_key]
        # encoded directly: encode(parts) would register this temporary list as a part of the item
        return tag + _digest(*map(self.encode, parts))


def _without_caches(state: Any, kind: type) -> Any:
    """Leave out the values cached by ``functools.cached_property``: they follow from the rest of the state."""
    if not isinstance(state, dict):
        return state
    return {
        name: value
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(getattr(kind, name, None), functools.cached_property))
    }


def _named(tag: bytes, kind: type) -> bytes:
    # without the module name, which for a class in a script is __main__ when run and another when imported
    return tag + _sized(kind.__qualname__.encode())


def _of_array(values: Any) -> bytes:
    header = f"{values.dtype.str}{values.shape}"
    return hashlib.blake2b(header.encode() + values.tobytes(), digest_size=8).digest()


def _sized(content: bytes) -> bytes:
    return b"%d:%b" % (len(content), content)


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(map(_sized, parts)), digest_size=8).digest()
