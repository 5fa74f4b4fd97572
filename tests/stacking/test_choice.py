"""Where trainings run and whether they are stacked: combinations that are refused, and what the messages advise."""

import pytest

from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution import workers_of
from lightning_dtda.stacking.choice import chosen_stacked


def chosen(stacked="auto", workers=1, compile=None):
    return chosen_stacked(stacked, workers_of(workers), compile)


@pytest.mark.parametrize(
    ("arguments", "message", "remedies"),
    [
        (
            {"stacked": "always"},
            'choose True, False or "auto"',
            [{"stacked": True}, {"stacked": False}, {"stacked": "auto"}],
        ),
        (
            {"stacked": False, "workers": 2, "compile": True},
            "Set stacked=True without workers, or leave out compile",
            [{"stacked": True, "workers": 1}, {"compile": None}],
        ),
        ({"stacked": True, "workers": 2}, "Leave out workers or stacked", [{"workers": 1}, {"stacked": "auto"}]),
    ],
)
def test_the_ways_out_of_a_refused_combination_are_accepted(arguments, message, remedies):
    with pytest.raises(ExecutionError, match=message):
        chosen(**arguments)
    for remedy in remedies:
        chosen(**(arguments | remedy))


def test_workers_train_one_by_one_and_the_log_says_how_to_stack(caplog):
    caplog.set_level("INFO", logger="lightning_dtda")
    assert chosen(workers=2) is False
    assert "leave out workers" in caplog.text
    assert chosen() == "auto"
