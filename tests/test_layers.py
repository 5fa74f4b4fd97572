"""Nothing imports upward: the contract is in pyproject.toml."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_no_room_imports_one_above_it(capsys):
    config = Path(__file__).parents[1] / "pyproject.toml"
    status = lint_imports(config_filename=str(config), cache_dir=None)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out
