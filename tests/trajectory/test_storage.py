"""Tensors are written as safetensors writes them, without a copy of them on the way."""

import errno
import io
import mmap
import os
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lightning_dtda.trajectory import storage
from lightning_dtda.trajectory.storage import _DTYPES, read_tensors, write_tensors


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_safetensors_reads_what_was_written(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "z": torch.randint(0, 2, (5, 3), generator=generator).to(dtype),
        "ä": torch.randint(0, 2, (2, 1, 4), generator=generator).to(dtype),
        "wide": torch.tensor(0.1, dtype=torch.float64),
        "narrow": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }

    entry = write_tensors(tmp_path / "file", tensors)

    content = (tmp_path / "file").read_bytes()
    assert entry == {"file": "file", "bytes": len(content), "crc32": zlib.crc32(content)}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(read[name]), bits(tensor)), name


def test_the_bytes_are_those_that_safetensors_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(5, 3, generator=generator),
        "z": torch.randn((), generator=generator),
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "wide": torch.tensor([0.1], dtype=torch.float64),
        "narrow": torch.tensor([True, False, True]),
    }

    write_tensors(tmp_path / "file", tensors)

    assert (tmp_path / "file").read_bytes() == safetensors.torch.save(tensors)


def test_a_tensor_may_be_larger_than_a_piece_a_view_or_conjugated(tmp_path):
    whole = torch.arange(3_000_000, dtype=torch.float32).reshape(1000, 3000)
    spectrum = torch.fft.fft(torch.linspace(0, 1, 8))
    tensors = {"whole": whole, "turned": whole[:, 1:3].T, "repeated": whole[0, 1].expand(7), "conj": spectrum.conj()}

    read = read_tensors(tmp_path, write_tensors(tmp_path / "file", tensors))

    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor.resolve_conj())), name


def test_no_copy_of_a_tensor_is_made(tmp_path):
    tensor = torch.zeros(2**22)
    write_tensors(tmp_path / "warm up", {"tensor": tensor[:1]})
    tracemalloc.start()
    write_tensors(tmp_path / "file", {"tensor": tensor})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # names and buffers of the file; torch's own memory is not counted, that of bytes and arrays is
    assert peak < tensor.nbytes / 64


def test_a_data_type_that_safetensors_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"cannot hold tensors of torch\.complex128, such as 'waves'"):
        write_tensors(tmp_path / "file", {"waves": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def large(dtype=torch.float32):
    """A tensor that may go past the cache; neither begins nor ends at a page."""
    return torch.randn(2, 5_000_001, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_read(path, entry, tensors):
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(bits(read[name]), bits(tensor)) for name, tensor in tensors.items())
    assert entry["crc32"] == zlib.crc32(path.read_bytes())


@pytest.fixture
def direct(monkeypatch):
    """Bytes of the pieces that were written past the cache."""
    sizes = []

    class Noting(io.FileIO):
        def write(self, piece):
            is_direct = bool(storage.fcntl.fcntl(self, storage.fcntl.F_GETFL) & os.O_DIRECT)
            written = super().write(piece)
            if is_direct:
                sizes.append(written)
            return written

    opening(monkeypatch, Noting)
    return sizes


def opening(monkeypatch, kind):
    """Let files that are written be of a kind."""
    usual = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode: io.BufferedWriter(kind(path, mode)) if mode == "xb" else usual(path, mode),
    )


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no way past their cache")


def has_direct_files(path):
    try:
        os.close(os.open(path / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


@on_linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [3, 4])
def test_a_large_tensor_goes_past_the_cache_and_the_file_is_a_safetensors_file(tmp_path, direct, dtype, norms):
    if not has_direct_files(tmp_path):
        pytest.skip("this file system has no way past the cache")
    tensors = {"gradients": large(dtype), "indices": torch.arange(5), "gradient_norms": torch.ones(norms)}

    entry = write_tensors(tmp_path / "file", tensors, direct=True)

    assert_read(tmp_path / "file", entry, tensors)
    assert entry["bytes"] == (tmp_path / "file").stat().st_size
    # all but what is left beside whole pages
    assert sum(direct) % mmap.PAGESIZE == 0
    if norms == 4 or dtype == torch.float32:
        assert sum(direct) > tensors["gradients"].nbytes - 2 * mmap.PAGESIZE
    else:  # then the norms, which come before what is narrower, end in the middle of 8 bytes, and all would be shifted
        assert not direct


@on_linux
def test_where_there_is_no_way_past_the_cache_the_file_is_the_same(tmp_path, monkeypatch):
    tensors = {"gradients": large(), "indices": torch.arange(5)}
    expected = write_tensors(tmp_path / "file", tensors, direct=True)
    control = storage.fcntl.fcntl

    def refuse(file, command, *flags):
        if flags and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(file, command, *flags)

    monkeypatch.setattr(storage.fcntl, "fcntl", refuse)
    entry = write_tensors(tmp_path / "file", tensors, direct=True)

    assert entry == expected
    assert_read(tmp_path / "file", entry, tensors)


@on_linux
def test_a_disk_that_is_full_is_an_error_past_the_cache_too(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, piece):
            if len(piece) > 2**20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(piece)

    opening(monkeypatch, Full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "file", {"gradients": large()}, direct=True)
    assert not list(tmp_path.iterdir())


@on_linux
@pytest.mark.parametrize("tensor", [large()[:, 1:], large()[:1, :200_000]], ids=["in parts", "small"])
def test_a_tensor_that_is_in_parts_or_small_goes_through_the_cache(tmp_path, direct, tensor):
    entry = write_tensors(tmp_path / "file", {"gradients": tensor, "indices": torch.arange(5)}, direct=True)

    assert not direct
    assert_read(tmp_path / "file", entry, {"gradients": tensor, "indices": torch.arange(5)})
