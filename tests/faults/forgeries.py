"""Forged files, with the checksums that they ought to have; pipes, folders and links in place of files."""

import contextlib
import copy
import json
import os
import resource
import signal

import psutil
import torch
from hypothesis import strategies as st
from safetensors.torch import load

from lightning_dtda.attribution.responses import _checksum, _checksum_of_all
from lightning_dtda.trajectory.storage import crc32, write_json, write_tensors

VALUES = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 10**30, -(10**400)]),
    st.sampled_from([0.5, -1.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", ".", "..", "../x", "/dev/zero", "a\0b", "\ud800", "lr", "float32", "none", "9" * 300, "CON"]),
    st.sampled_from([[], {}, [[]], [1, 2, 3], {"a": 1}, [2**40] * 3, [1] * 200]),
    st.integers(2, 120).map(lambda depth: json.loads("[" * depth + "]" * depth)),
    st.integers(2, 120).map(lambda depth: json.loads('{"a":' * depth + "1" + "}" * depth)),
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def places(content, path=()):
    """Every place in JSON data: the keys on the way there."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


def forge_json(draw, content):
    """Change one place of JSON data: another value, one from elsewhere, nothing, or the same twice."""
    everywhere = list(places(content))
    *way, key = draw(st.sampled_from(everywhere))
    where = at(content, way)
    how = draw(st.sampled_from(["value", "value", "delete", "exchange", "repeat", "rename"]))
    if how == "value":
        where[key] = copy.deepcopy(draw(VALUES))
    elif how == "delete":
        del where[key]
    elif how == "exchange":
        where[key] = json.loads(json.dumps(at(content, draw(st.sampled_from(everywhere)))))
    elif how == "repeat" and isinstance(where, list):
        where.insert(key, json.loads(json.dumps(where[key])))
    elif isinstance(where, dict):
        where[draw(st.sampled_from(["", "x", "-1", "99", "1e3", "../x", "\ud800", *map(str, where)]))] = where.pop(key)


def forge_tensor(draw, tensors):
    """Change one tensor: its values, type or shape, or that it is there."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name].clone()
    how = draw(st.sampled_from(["values", "values", "type", "shape", "longer", "shorter", "delete", "rename", "add"]))
    if how == "values" and tensor.numel():
        place = draw(st.integers(0, tensor.numel() - 1))
        values = [-1, 0, 1, 2, 100, 2**40, -(2**62)] + ([float("nan"), 1e30] if tensor.is_floating_point() else [])
        value = torch.tensor(draw(st.sampled_from(values)))
        tensor.view(-1)[place] = value.to(tensor.dtype)
    elif how == "type":
        tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    elif how == "shape":
        tensor = draw(st.sampled_from([tensor[None], tensor.reshape(-1), tensor.mT if tensor.ndim > 1 else tensor]))
    elif how == "longer" and tensor.ndim:
        tensor = torch.cat([tensor, tensor[:1]])
    elif how == "shorter" and tensor.ndim:
        tensor = tensor[: draw(st.integers(0, max(0, len(tensor) - 1)))]
    if how == "delete":
        del tensors[name]
    elif how == "rename":
        tensors[draw(st.sampled_from(["", "state.9.x", "state.x.y", "leaves.x", "leaves.0", "rng_states.cpu"]))] = (
            tensors.pop(name)
        )
    elif how == "add":
        tensors[draw(st.sampled_from(["state.9.x", "state.x.y", "leaves.x", "leaves.0", "rng_states.cpu"]))] = tensor
    else:
        tensors[name] = tensor.contiguous()


def entries(content):
    """The entries of files in an index."""
    if isinstance(content, dict):
        if {"file", "bytes", "crc32"} <= content.keys():
            yield content
        for value in content.values():
            yield from entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from entries(value)


def forge_header(draw, content):
    """Change the description of the tensors in a file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    forge_json(draw, header)
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text) + 1, 2**40, 2**64 - 1, 0]))
    return length.to_bytes(8, "little") + text + content[8 + size :]


def forge(draw, directory, index_name, table=None):
    """Forge one thing in a directory, with right checksums.

    Args:
        draw: Draws from a strategy.
        directory: The directory.
        index_name: Name of its index.
        table: Name of the tensor whose rows have checksums of their own.
    """
    path = directory / index_name
    index = json.loads(path.read_bytes())
    index.pop("crc32")
    files = list(entries(index))
    own = sorted(directory.glob("trainings-*"))
    kind = draw(st.sampled_from(["index", "index", "tensor", "tensor", "header"]))
    if kind != "index" and (files or own):
        entry = draw(st.sampled_from(files)) if files else None
        file = directory / entry["file"] if entry else draw(st.sampled_from(own))
        content = file.read_bytes()
        if kind == "header":
            content = forge_header(draw, content)
            file.write_bytes(content)
            checksum = crc32(content)
        else:
            tensors = load(content)
            forge_tensor(draw, tensors)
            if table in tensors and "checksums" in tensors and draw(st.booleans()):
                tensors["checksums"] = torch.tensor([_checksum(row) for row in tensors[table]], dtype=torch.int64)
            checksum = write_tensors(file, tensors)["crc32"]
            if table is not None:
                others = [tensor for name, tensor in tensors.items() if name not in (table, "checksums")]
                named = tensors.get("checksums")
                checksum = _checksum_of_all(others if named is None else [*others, named])
        if entry:
            entry |= {"bytes": file.stat().st_size, "crc32": checksum}
        else:
            file.rename(file.with_name(f"trainings-forged-{checksum:08x}.safetensors"))
    for _ in range(draw(st.integers(1, 2)) if kind == "index" else 0):
        forge_json(draw, index)
    write_json(path, index)


IN_PLACE = ["pipe", "folder", "link to /dev/zero", "link to nothing", "link to itself", "empty", "sparse", "deep"]


def put_in_place(path, what):
    """Put something else in the place of a file."""
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(2**42)
    elif what == "deep":
        path.write_bytes(b"[" * 10**6 + b"]" * 10**6)
    else:
        path.symlink_to({"link to /dev/zero": "/dev/zero", "link to nothing": "nowhere"}.get(what, path.name))


@contextlib.contextmanager
def bounded(seconds=30, memory=4 * 2**30):
    """Let what takes too long, or more memory, fail."""

    def too_long(*_):
        raise TimeoutError(f"longer than {seconds} s")

    usual = signal.signal(signal.SIGALRM, too_long)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
        resource.setrlimit(resource.RLIMIT_AS, limits)
