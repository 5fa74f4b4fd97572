"""An optimizer that is not known: the interface that the documentation describes, on its own example."""

import re
from pathlib import Path

import pytest
import torch

from lightning_dtda.optimizers import UPDATES
from tests.estimators.test_finite_differences import assert_finite_differences_agree

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "recording.md"


@pytest.fixture
def adadelta():
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL) if "Adadelta" in code
    ]
    known = dict(UPDATES)
    exec(example, {})
    yield
    UPDATES.clear()
    UPDATES.update(known)


def test_the_documented_update_is_recorded_and_attributed_exactly(fit, tmp_path, adadelta):
    assert_finite_differences_agree(fit, tmp_path, lambda module: torch.optim.Adadelta(module.parameters(), lr=0.5))
