"""What the documentation shows runs as it stands there, and names what is there."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from lightning_dtda.cli import COMMANDS, main
from tests.docs.pages import PAGES, ROOT, Block, blocks, run_page


def of_pages(language: str) -> list[Any]:
    """Return the pages that have blocks in a language, as parameters."""
    return [
        pytest.param(page, id=name)
        for name, page in PAGES.items()
        if blocks(page, language) and name != "first-attribution"
    ]


@pytest.mark.slow  # the pages go on from this tutorial
def test_the_first_tutorial_runs(tutorial: tuple[dict[str, Any], Path]) -> None:
    names, directory = tutorial
    assert names["mean"].argmin() == 3  # the page says that it is the most harmful example
    assert names["mean"].min() < 0
    assert names["truth"].influence("mean").mean() < 0  # and that retraining agrees about the direction
    assert (directory / "report.html").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what Lightning says about small data
@pytest.mark.parametrize("page", of_pages("python"))
def test_python_blocks_run(page: Path, start: Any) -> None:
    run_page(page, start(page))


def commands(block: Block) -> list[list[str]]:
    """Return the arguments of each lightning-dtda in a shell block."""
    lines = block.code.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True)[1:] for part in parts if part.split()[:1] == ["lightning-dtda"]]


class ParsedSignal(BaseException):
    """Raised once a command's options are parsed, before it does anything."""


@pytest.mark.parametrize("page", of_pages("bash"))
def test_options_of_shell_blocks_are_known(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configuration = files("lightning_dtda.demo") / "diabetes.yaml"
    for place in ("config.yaml", "lightning_dtda/demo/diabetes.yaml", "runs/mine/config.yaml"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(configuration), place)
    parse = jsonargparse.ArgumentParser.parse_args

    def only_parse(parser: jsonargparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse(parser, *args, **kwargs)
        raise ParsedSignal

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", only_parse)
    for block in blocks(page, "bash"):
        for arguments in commands(block):
            assert arguments[0] in COMMANDS, block
            with pytest.raises(ParsedSignal):
                main(arguments)


def test_an_unknown_option_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nlightning-dtda report --attribution a --colour red\n```\n")
    with pytest.raises(SystemExit):
        test_options_of_shell_blocks_are_known(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|benchmarks|examples|lightning_dtda)/[\w/.]+)`", page.read_text(encoding="utf-8"))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
