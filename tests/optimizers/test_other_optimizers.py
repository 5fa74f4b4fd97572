"""An optimizer that is not known: the interface that the documentation describes, on its own example; and refusals."""

import re
from pathlib import Path

import pytest
import torch

from lightning_dtda.errors import RecordingError
from lightning_dtda.optimizers import NO_DERIVATIVE, UPDATES
from lightning_dtda.recording.checks import refuse_optimizers
from tests.finite_differences import assert_finite_differences_agree

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "extend.md"


@pytest.fixture
def documented():
    """What the documentation's example defines."""
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL) if "QHM" in code
    ]
    known, defined = dict(UPDATES), {"__name__": "documentation"}
    exec(example, defined)
    yield defined
    UPDATES.clear()
    UPDATES.update(known)


def test_the_documented_update_is_recorded_and_attributed_exactly(fit, tmp_path, documented):
    assert_finite_differences_agree(
        fit, tmp_path, lambda module: documented["QHM"](module.parameters(), lr=0.2), gradients="none"
    )


class LoggingAdam(torch.optim.Adam):
    """Computes what its parent does."""


def test_a_subclass_may_be_given_the_update_of_its_parent(fit, tmp_path, monkeypatch):
    path = f"{LoggingAdam.__module__}.{LoggingAdam.__qualname__}"
    monkeypatch.setitem(UPDATES, path, UPDATES["torch.optim.adam.Adam"])
    assert_finite_differences_agree(fit, tmp_path, lambda module: LoggingAdam(module.parameters(), lr=0.02))


def of_class(name):
    """An optimizer of a class of that name, in a package that is not torch's."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    return type(name, (torch.optim.SGD,), {"__module__": "some_package"})([parameter], lr=0.1)


@pytest.mark.parametrize("name", NO_DERIVATIVE)
def test_an_optimizer_without_a_useful_derivative_is_refused_with_the_reason(name):
    with pytest.raises(RecordingError, match=f"some_package.{name} cannot be followed: (it|its) .*Train with .*AdamW"):
        refuse_optimizers([of_class(name)])


def test_the_error_of_an_unknown_optimizer_says_under_which_name_to_register_it(monkeypatch):
    optimizer = of_class("Unheard")
    with pytest.raises(RecordingError, match="is unknown") as caught:
        refuse_optimizers([optimizer])
    (path,) = re.findall(r'UPDATES\["(.*)"\] = ', str(caught.value))
    monkeypatch.setitem(UPDATES, path, UPDATES["torch.optim.sgd.SGD"])
    assert refuse_optimizers([optimizer]) is optimizer


def test_every_optimizer_of_torch_is_supported_or_refused_with_a_reason():
    for name, optimizer in vars(torch.optim).items():
        if isinstance(optimizer, type) and name != "Optimizer":
            path = f"{optimizer.__module__}.{optimizer.__qualname__}"
            assert (path in UPDATES) != (name in NO_DERIVATIVE), name
