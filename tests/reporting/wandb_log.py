"""Reads what an offline W&B run wrote, without W&B's own reader."""

import struct
import time

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32 * 1024, 7


def read_records(path, seconds=20.0):
    """Return the records of a ``.wandb`` file, as soon as its last one has been written."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        records = list(_parse(path.read_bytes()))
        if records and any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.02)  # the writer is another process: finish() may return before the file is complete
    raise TimeoutError(f"{path} has no exit record after {seconds} s")


def _parse(data):
    """Yield records: LevelDB's log format after a header of seven bytes."""
    if len(data) < _HEADER:
        return  # nothing is written yet
    assert struct.unpack("<4sHB", data[:_HEADER]) == (b":W&B", 0xBEE1, 0)
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # a block's end that is too short for a header is padding
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # full, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
