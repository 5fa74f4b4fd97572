"""What stands at the top is little, and each verb of the command line is one of its functions."""

import lightning_dtda
from lightning_dtda.cli import COMMANDS

VERBS = {command: command for command in COMMANDS} | {"suggest": "suggest_removals"}
NOUNS = {
    "Attribution",
    "Ensemble",
    "GroundTruth",
    "InfluenceFunctions",
    "Run",
    "TrajectoryRecorder",
    "UnrolledDifferentiation",
    "__version__",
    "plot",
}


def test_the_top_has_the_nouns_and_a_function_for_each_verb_of_the_command_line():
    verbs = {name for command, name in VERBS.items() if command != "demo"}
    assert set(lightning_dtda.__all__) == NOUNS | verbs
    assert all(callable(getattr(lightning_dtda, name)) for name in verbs)


def test_every_name_at_the_top_is_there():
    assert all(getattr(lightning_dtda, name) is not None for name in lightning_dtda.__all__)
