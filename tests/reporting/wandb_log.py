"""Reads what an offline W&B run wrote, without W&B's own reader."""

import json
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32 * 1024, 7


class Logged:
    """What a run's log holds."""

    def __init__(self, directory, run):
        [path] = Path(directory).glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")
        self.files = path.parent / "files"
        records = {}
        for record in read_records(path):
            records.setdefault(record.WhichOneof("record_type"), []).append(record)
        self.run = records["run"][0].run
        self.exit_code = records["exit"][0].exit.exit_code
        artifacts = [record.artifact for record in records.get("artifact", [])]
        self.inputs = {artifact.name: artifact for artifact in artifacts if artifact.use_after_commit}
        self.outputs = {artifact.name: artifact for artifact in artifacts if not artifact.use_after_commit}
        updates = [item for record in records.get("config", []) for item in record.config.update]
        settings = [item for item in [*self.run.config.update, *updates] if item.key]
        self.config = {item.key: json.loads(item.value_json) for item in settings if item.key != "_wandb"}
        charts = [item for item in updates if item.nested_key[:2] == ["_wandb", "visualize"]]
        self.charts = {item.nested_key[2]: json.loads(item.value_json) for item in charts}
        self.steps = [self._items([entry.history.item]) for entry in records["history"]]
        self.history = {key: value for step in self.steps for key, value in step.items()}
        self.summary = self._items(entry.summary.update for entry in records["summary"])

    def content(self, value):
        """Return the JSON of a file that was logged, such as a table."""
        return json.loads((self.files / value["path"]).read_text())

    @staticmethod
    def _items(groups):
        items = {}
        for item in (item for group in groups for item in group):
            *outer, last = item.nested_key or [item.key]
            place = items
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = json.loads(item.value_json)
        return items


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
        if at + _HEADER + length > len(data):
            return  # the rest of the record is not written yet
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # full, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
