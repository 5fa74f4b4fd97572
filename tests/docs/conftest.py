"""What a page of the documentation starts from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, notes, run_page


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the first tutorial leaves: its names and its files."""
    directory = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        names = run_page(PAGES["first-attribution"], {"__name__": "page"})
    return names, directory


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that prepares the working directory and the names that a page starts from."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")

    def prepare(page: Path) -> dict[str, Any]:
        notices = notes(page)
        if notices.get("continues") is None:
            return {"__name__": "page"}
        assert notices["continues"] == "first-attribution"
        names, directory = request.getfixturevalue("tutorial")
        shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
        for pair in filter(None, notices.get("where", "").split("; ")):
            ours, its = pair.split(" = ")
            names = {**names, ours: names[its]}
        return dict(names)

    return prepare
