"""``lightning-dtda export``: influences, and how sure they are, as a file that other tools read."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lightning_dtda.attribution.exporting import Format, export
from lightning_dtda.cli import add_differences


def run(arguments: Sequence[str]) -> None:
    """Write the file and say where it is."""
    parser = ArgumentParser(
        prog="lightning-dtda export",
        description="Write the influence of every example on every query, with standard errors, intervals, p-values "
        "and q-values, to a file that other tools read. Needs pip install 'lightning-dtda[export]'.",
    )
    parser.add_argument("--attribution", type=str, required=True, help="Directory of the attribution.")
    parser.add_argument("--output", type=str, required=True, help="The file to write; of Zarr a directory.")
    parser.add_argument(
        "--format",
        type=Format,
        default="parquet",
        help="parquet, one row for each query and example; zarr or netcdf, a data set for xarray.",
    )
    add_differences(parser)
    parser.add_argument("--level", type=float, default=0.95, help="Confidence of the intervals.")
    parser.add_argument(
        "--replicates",
        type=int,
        default=1000,
        help="Draws of the bootstrap for each interval; 0 leaves intervals out, which take far longer than the rest.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace what is there.")
    options = parser.parse_args(list(arguments))
    path = export(
        options.attribution,
        options.output,
        options.format,
        options.differences,
        level=options.level,
        replicates=options.replicates,
        overwrite=options.overwrite,
    )
    print(f"The influences are in {path}.")
