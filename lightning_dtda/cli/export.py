"""``lightning-dtda export``: influences and their uncertainty, as a file for other tools."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lightning_dtda.cli import add_differences, say

FORMATS = ("parquet", "zarr", "netcdf")
"""The formats of :func:`lightning_dtda.export`, which takes seconds to import."""


def run(arguments: Sequence[str]) -> None:
    """Write the file and print its path."""
    parser = ArgumentParser(
        prog="lightning-dtda export",
        description="Write the influence of every example on every query, with standard errors, intervals, p-values "
        "and q-values, to a file for other tools. Needs pip install 'lightning-dtda[export]'.",
    )
    parser.add_argument("--attribution", type=str, required=True, help="Directory of the attribution.")
    parser.add_argument("--output", type=str, required=True, help="File to write; for zarr, a directory.")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="parquet",
        help="parquet, with one row for each query and example; zarr or netcdf, a data set for xarray.",
    )
    add_differences(parser)
    parser.add_argument("--level", type=float, default=0.95, help="Confidence level of the intervals.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    options = parser.parse_args(list(arguments))
    from lightning_dtda import export  # imported here to keep --help fast

    path = export(
        options.attribution,
        options.output,
        options.format,
        options.differences,
        level=options.level,
        overwrite=options.overwrite,
    )
    say(f"The influences are in {path}.")
