"""Files beside the data replace no module of Python or of a package; classes there are found all the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dtda import Attribution

_ROOT = Path(__file__).parents[2]
_HOSTILE = "import pathlib; pathlib.Path(__file__).with_suffix('.executed').touch()\n"

_OWN = """
from lightning_dtda.statistics import Mean

class Own(Mean):
    name = "own"
"""


@pytest.fixture
def beside(tmp_path):
    """A directory with an attribution and files named like modules, some of them of optional packages."""
    Attribution(torch.randn(5, 1), torch.randn(5, 1, 3), tuple("abcde"), (0,)).save(tmp_path / "answer")
    for name in ("html", "json", "plotly", "orjson", "isal"):
        (tmp_path / f"{name}.py").write_text(_HOSTILE)
    return tmp_path


def run(directory, *arguments, as_module=False):
    script = directory / "bin" / "lightning-dtda"  # as pip writes it: its own directory is first on sys.path
    script.parent.mkdir(exist_ok=True)
    script.write_text("from lightning_dtda.cli import main\nmain()\n")
    program = ["-m", "lightning_dtda"] if as_module else [str(script)]
    code = f"import sys; sys.path.append({str(_ROOT)!r})"  # like site-packages, after everything else
    (script.parent / "sitecustomize.py").write_text(code)
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=directory,
        env={"PATH": "", "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("as_module", [False, True], ids=["console script", "python -m"])
def test_a_report_executes_nothing_beside_the_data(beside, as_module):
    done = run(beside, "report", "--attribution", "answer", as_module=as_module)
    assert done.returncode == 0, done.stderr
    assert (beside / "report.html").exists()
    assert not list(beside.glob("*.executed"))


@pytest.mark.slow
def test_a_difference_in_the_working_directory_is_found(beside):
    (beside / "mine.py").write_text(_OWN)
    for optional in ("orjson", "isal"):  # the directory comes last: what is not installed is found there, too
        (beside / f"{optional}.py").unlink()
    done = run(beside, "report", "--attribution", "answer", "--differences", "mine.Own")
    assert done.returncode == 0, done.stderr
    assert "own" in (beside / "report.html").read_text()
    assert not list(beside.glob("*.executed"))
