"""Export of influences and their uncertainty to files for other tools: Parquet, Zarr or netCDF."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.inference import Runs, check_share, inferences
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import Difference, Inference

Format = Literal["parquet", "zarr", "netcdf"]

_PACKAGES = {"parquet": ["pyarrow"], "zarr": ["zarr"], "netcdf": ["h5netcdf", "h5py"]}
"""Packages that each format needs."""

_KINDS = ("influence", "standard_error", "low", "high", "p", "q")
"""Columns of each difference."""


def export(
    attribution: Attribution | str | Path,
    output: str | Path,
    format: Format = "parquet",
    differences: Sequence[str | Difference] | None = None,
    *,
    level: float = 0.95,
    runs: Runs = "trusted",
    overwrite: bool = False,
) -> Path:
    r"""Write the influence of every removal on every query, with its uncertainty, to a file.

    For each difference the file has ``influence``, ``standard_error``, ``low`` and ``high`` (the ends of the interval),
    ``p`` (the p-value, :meth:`Attribution.p_values`) and ``q`` (the smallest false discovery rate at which the
    influence is :meth:`Attribution.significant`), prefixed with the name of the difference, as in ``mean_influence``.
    Values that need more runs, and the ends of intervals that do not exist, are NaN. If the measurement's range is
    known, ``out_of_range`` is the share of runs that are predicted outside of it without the example
    (:meth:`Attribution.out_of_range`). An influence is the change of the property when the examples are removed.

    Queries are computed and written one by one: memory does not grow with their number.

    Args:
        attribution: The attribution, or its directory.
        output: File to write; for Zarr, a directory.
        format: ``"parquet"``, with one row for each query and example, and one row group for each query; ``"zarr"`` or
            ``"netcdf"``, data sets for xarray with the dimensions ``query`` and ``example``. With groups of examples,
            ``removal`` and ``size`` replace ``example``.
        differences: As for :meth:`Attribution.influence`. ``None`` means :attr:`Attribution.available_differences`.
        level: Confidence level of the intervals.
        runs: As for :meth:`Attribution.influence`.
        overwrite: Whether to replace an existing output.

    Returns:
        The path of the output.

    Raises:
        AttributionError: If the package that writes the format is not installed, the output exists or cannot be
            written, two differences have the same name, or a difference needs more runs.
        TrajectoryError: If the attribution's files are missing or damaged.
    """
    output = Path(output)
    if format not in get_args(Format):
        raise AttributionError(f"format={format!r}; choose from {', '.join(get_args(Format))}.")
    if output.exists() and not overwrite:
        raise AttributionError(
            f"{output} already exists. Choose another output, or overwrite it (overwrite=True, --overwrite)."
        )
    check_share(level, "level")
    for package in _PACKAGES[format]:
        _require(package)
    attribution = attribution if isinstance(attribution, Attribution) else Attribution.load(attribution)
    selected = attribution._selected(runs)
    chosen = [selected._difference(each) for each in differences or selected.available_differences]
    names = [difference.name for difference in chosen]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AttributionError(f"Two differences are called {min(twice)}. Export them to separate files.")
    content = _Content(selected, chosen, level)
    partial = output.with_name(f".{output.name}.partial")
    try:
        _remove(partial)
        output.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[format](partial, content)
        _remove(output)
        partial.rename(output)
    except OSError as error:
        reason = " ".join(str(error).split())  # HDF5 puts every detail on a line of its own
        raise AttributionError(f"{output} cannot be written to ({reason}). Choose another output.") from error
    finally:
        _remove(partial)
    return output


@dataclass(frozen=True)
class _Content:
    """The content of a file, independent of its format."""

    attribution: Attribution
    differences: Sequence[Difference]
    level: float

    @property
    def removal(self) -> str:
        """Name of the dimension of the removals."""
        return "example" if self.attribution.removals is None else "removal"

    @property
    def removals(self) -> dict[str, Any]:
        """Columns that identify the removals."""
        names, members = self.attribution.removals, self.attribution.members
        if names is None or members is None:
            return {"example": np.arange(self.attribution.responses.shape[2])}
        return {"removal": np.array(names, dtype=object), "size": np.array([len(group) for group in members])}

    @property
    def attributes(self) -> dict[str, str]:
        """Description of the attribution, each entry as JSON."""
        about = {**self.attribution.about, "runs": self.attribution.runs, "level": self.level}
        return {key: json.dumps(value, default=str) for key, value in about.items()}

    @property
    def columns(self) -> list[str]:
        """Names of the computed columns."""
        names = [f"{difference.name}_{kind}" for difference in self.differences for kind in _KINDS]
        return [*names, "out_of_range"] if self._has_range else names

    @property
    def _has_range(self) -> bool:
        return any(map(math.isfinite, self.attribution.known_range))

    def queries(self) -> Iterator[dict[str, Any]]:
        """Yield the computed columns of each query, arrays ``(removals,)``."""
        for position in range(len(self.attribution.queries)):
            one = self.attribution.select([position])
            found = zip(self.differences, inferences(one, self.differences, self.level, runs="all"), strict=True)
            columns = {name: part.cpu().numpy() for each in found for name, part in _columns(*each, len(one.runs))}
            outside = {"out_of_range": one.out_of_range(runs="all")[0].cpu().numpy()} if self._has_range else {}
            yield columns | outside


def _columns(difference: Difference, found: Inference, runs: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the columns of one difference on the only query ``(removals,)``, by name."""
    estimate, error, p, ends = (part[..., 0, :] for part in found)
    q = significance.q_values(p) if runs >= difference.least_runs_to_test else p
    for kind, column in zip(_KINDS, (estimate, error, *ends, p, q), strict=True):
        yield f"{difference.name}_{kind}", column


def _write_parquet(path: Path, content: _Content) -> None:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    removals = {name: pyarrow.array(column) for name, column in content.removals.items()}
    fields = [("query", pyarrow.int64()), *((name, column.type) for name, column in removals.items())]
    fields += [(name, pyarrow.float64()) for name in content.columns]
    schema = pyarrow.schema(fields, metadata=content.attributes)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for query, columns in zip(content.attribution.queries, content.queries(), strict=True):
            number = len(removals[content.removal])
            rows = {"query": np.full(number, query, dtype=np.int64), **removals, **columns}
            writer.write_table(pyarrow.table(rows, schema=schema), row_group_size=number)


def _write_zarr(path: Path, content: _Content) -> None:
    import xarray as xr

    # without consolidated metadata, which the format's specification does not define
    for position, columns in enumerate(content.queries()):
        data = {name: (("query", content.removal), column[None]) for name, column in columns.items()}
        part = xr.Dataset(data, {"query": [content.attribution.queries[position]]})
        if position:
            part.to_zarr(path, append_dim="query", consolidated=False)
        else:
            said = {name: (content.removal, column) for name, column in content.removals.items()}
            part.assign_coords(said).assign_attrs(content.attributes).to_zarr(path, mode="w", consolidated=False)


def _write_netcdf(path: Path, content: _Content) -> None:
    h5netcdf = importlib.import_module("h5netcdf")
    queries, removals = content.attribution.queries, content.removals
    shape = len(queries), len(removals[content.removal])
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"query": shape[0], content.removal: shape[1]}
        file.attrs.update(content.attributes)
        file.create_variable("query", ("query",), np.int64, data=np.array(queries))
        for name, column in removals.items():
            kind = importlib.import_module("h5py").string_dtype() if column.dtype == object else column.dtype
            file.create_variable(name, (content.removal,), kind, data=column)
        for name in content.columns:
            file.create_variable(name, ("query", content.removal), np.float64, chunks=(1, shape[1]), compression="gzip")
        for position, columns in enumerate(content.queries()):
            for name, column in columns.items():
                file.variables[name][position] = column


_WRITERS: dict[str, Callable[[Path, _Content], None]] = {
    "parquet": _write_parquet,
    "zarr": _write_zarr,
    "netcdf": _write_netcdf,
}


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise AttributionError(
            f"{package} is not installed ({error}). Run: pip install 'lightning-dtda[export]'"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
