"""One fixture that stands for every case."""

import pytest

from tests.zoo.cases import CASES

collect_ignore = sorted({f"{case.source}.py" for case in CASES.values() if case.requires})
"""Files that hold no doctests and whose packages may be missing, or take seconds to import."""


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    request.param.skip_unless_installed()
    return request.param


@pytest.fixture(autouse=True)
def _own_working_directory(monkeypatch, tmp_path):
    # some packages leave files where they run
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_seed_left_behind(monkeypatch):
    # seed_everything writes to the environment; setting the variable first lets monkeypatch take it away again
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("PL_GLOBAL_SEED")
