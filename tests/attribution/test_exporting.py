"""Exports, read back by the libraries that own the formats."""

import json
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import xarray as xr

from lightning_dtda import Attribution, export
from lightning_dtda.cli import main
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Quantile

RUNS, QUERIES, EXAMPLES = 10, (4, 8, 15), 7
KINDS = ("influence", "standard_error", "low", "high", "p", "q")


@pytest.fixture
def attribution():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(RUNS, len(QUERIES), generator=generator)
    responses = 0.3 + torch.randn(RUNS, len(QUERIES), EXAMPLES, generator=generator)
    return Attribution(
        baseline, responses, tuple(f"seed-{s:04d}" for s in range(RUNS)), QUERIES, {"measurement": "loss"}
    )


@pytest.fixture
def grouped(attribution):
    groups = [{"name": f"group {n}", "examples": list(range(n + 1))} for n in range(EXAMPLES)]
    return Attribution(attribution.baseline, attribution.responses, attribution.runs, QUERIES, {"removals": groups})


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


FORMATS = [
    pytest.param("parquet", marks=needs("pyarrow")),
    pytest.param("zarr", marks=needs("zarr")),
    pytest.param("netcdf", marks=needs("h5netcdf")),
]


def read(path, format):
    """What is in a file, as a data set."""
    if format == "parquet":
        import pyarrow.parquet

        frame = pyarrow.parquet.read_table(path).to_pandas()
        removal = "example" if "example" in frame else "removal"
        dataset = frame.set_index(["query", removal]).to_xarray()
        if "size" in dataset:
            dataset["size"] = dataset["size"].isel(query=0)
        return dataset
    engine = {"zarr": {"engine": "zarr", "consolidated": False}, "netcdf": {"engine": "h5netcdf"}}[format]
    with xr.open_dataset(path, **engine) as dataset:
        return dataset.load()


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_back_is_what_the_attribution_says(attribution, tmp_path, format):
    path = export(attribution, tmp_path / "table", format, ["mean", "wasserstein"], level=0.9)
    dataset = read(path, format)
    assert dataset["query"].values.tolist() == list(QUERIES)
    assert dataset["example"].values.tolist() == list(range(EXAMPLES))
    for name in ("mean", "wasserstein"):
        expected = {
            "influence": attribution.influence(name),
            "standard_error": attribution.standard_error(name),
            **dict(zip(("low", "high"), attribution.interval(name, 0.9), strict=True)),
            "p": attribution.p_values(name),
        }
        for kind, values in expected.items():
            np.testing.assert_allclose(dataset[f"{name}_{kind}"].values, values, rtol=1e-12)
        for fdr in (0.05, 0.3):
            significant = dataset[f"{name}_q"].values <= fdr
            np.testing.assert_array_equal(significant, attribution.significant(name, fdr))
    assert {f"variance_{kind}" for kind in KINDS}.isdisjoint(dataset)


@pytest.mark.parametrize("format", FORMATS)
def test_groups_are_named_and_have_sizes(grouped, tmp_path, format):
    dataset = read(export(grouped, tmp_path / "table", format, ["variance"]), format)
    assert set(dataset.data_vars) - {"size"} == {f"variance_{kind}" for kind in KINDS}
    assert dataset["variance_low"].isnull().all()  # it has no interval
    found = dataset["variance_influence"].sel(query=8, removal="group 3").item()
    assert found == pytest.approx(grouped.influence("variance")[1, 3].item())
    assert dataset["size"].sel(removal="group 3").item() == 4


@needs("pyarrow")
def test_a_query_is_a_group_of_rows_and_what_was_asked_is_in_the_file(attribution, tmp_path):
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(export(attribution, tmp_path / "table.parquet"))
    assert file.num_row_groups == len(QUERIES)
    assert json.loads(file.schema_arrow.metadata[b"measurement"]) == "loss"


@needs("pyarrow")
def test_what_so_few_runs_do_not_tell_is_not_a_number(attribution, tmp_path):
    two = Attribution(attribution.baseline[:2], attribution.responses[:2], attribution.runs[:2], QUERIES)
    with pytest.warns(UserWarning, match="Influences of 2 runs"):
        path = export(two, tmp_path / "table", differences=["spread"])
    dataset = read(path, "parquet")
    known = [kind for kind in KINDS if not dataset[f"spread_{kind}"].isnull().all()]
    assert known == ["influence"]


@needs("pyarrow")
def test_the_command_exports_a_stored_attribution_and_replaces_only_on_demand(attribution, tmp_path, capsys):
    attribution.save(tmp_path / "saved")
    arguments = [
        "export",
        "--attribution",
        str(tmp_path / "saved"),
        "--output",
        str(tmp_path / "out" / "table.parquet"),
    ]
    main([*arguments, "--differences", "mean"])
    assert f"The influences are in {tmp_path / 'out' / 'table.parquet'}" in capsys.readouterr().out
    dataset = read(tmp_path / "out" / "table.parquet", "parquet")
    np.testing.assert_allclose(dataset["mean_influence"], attribution.influence("mean"), rtol=1e-12)
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--differences", "variance"])
    assert "exists. Choose another output, or overwrite it (overwrite=True, --overwrite)" in capsys.readouterr().err
    main([*arguments, "--differences", "variance", "--overwrite"])
    assert "variance_influence" in read(tmp_path / "out" / "table.parquet", "parquet")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.parquet"]


@pytest.mark.parametrize(
    ("format", "package"), [("parquet", "pyarrow"), ("zarr", "zarr"), ("netcdf", "h5netcdf"), ("netcdf", "h5py")]
)
def test_a_package_that_is_not_there_is_named_with_the_command_that_brings_it(
    attribution, tmp_path, monkeypatch, format, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AttributionError, match=rf"{package} is not installed .*pip install 'lightning-dtda\[export\]'"):
        export(attribution, tmp_path / "table", format)


@needs("pyarrow")
def test_what_makes_no_sense_is_refused(attribution, tmp_path):
    for arguments, message in (
        ({"format": "csv"}, "format='csv'; choose from parquet, zarr, netcdf"),
        (
            {"differences": [Quantile(0.1), Quantile(0.1)]},
            r"Two differences are called quantile\(0.1\). Export them to separate files",
        ),
        ({"level": 1.0}, "level=1.0; give a share between 0 and 1"),
        ({"output": tmp_path / "a-file" / "table"}, "cannot be written .*Choose another output"),
    ):
        (tmp_path / "a-file").touch()
        with pytest.raises(AttributionError, match=message):
            export(attribution, **{"output": tmp_path / "table", **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.parametrize("format", FORMATS)
def test_of_a_top_that_was_kept_every_column_is_there(attribution, format, tmp_path):
    kept = attribution.keep_top(1)
    found = read(export(kept, tmp_path / "kept", format), format)
    expected = read(export(attribution, tmp_path / "all", format, ["mean", "spread"]), format)
    assert set(found) == set(expected)
    for name, column in found.items():
        values, wanted = (part.transpose("query", "example").values for part in (column, expected[name]))
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("format", FORMATS)
def test_two_settings_of_a_difference_have_columns_of_their_own(attribution, tmp_path, format):
    low, high = Quantile(0.1), Quantile(0.9)
    found = read(export(attribution, tmp_path / "table", format, [low, high]), format)
    for name, difference in (("quantile(0.1)", low), ("quantile", high)):
        np.testing.assert_allclose(found[f"{name}_influence"].values, attribution.influence(difference), rtol=1e-12)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links")
@pytest.mark.parametrize("what", ["pipe", "link", "link to nothing"])
def test_nothing_is_exported_through_a_pipe_or_a_link(attribution, tmp_path, what):
    (tmp_path / "precious").mkdir()
    for path in (tmp_path / "table.parquet", tmp_path / ".table.parquet.partial"):
        if what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(tmp_path / ("precious" if what == "link" else "nothing"))
    output = export(attribution, tmp_path / "table.parquet", overwrite=True)
    assert output.is_file()
    assert not output.is_symlink()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["precious", "table.parquet"]
