"""The exceptions that lightning-dtda raises. Their messages say what is wrong, where, and what to do about it."""


class DTDAError(Exception):
    """Base class of all errors that lightning-dtda raises on purpose."""


class RecordingError(DTDAError):
    """A training cannot be recorded, or its recording failed."""


class DiskSpaceError(RecordingError):
    """The disk has not enough space for the runs that are to be recorded, or became full while they were."""


class TrajectoryError(DTDAError):
    """A recorded run or ensemble is missing, damaged, incomplete or inconsistent."""


class UnknownFormatError(TrajectoryError):
    """A file has a format that this version does not know. It was written by another version and may be intact."""


class CompatibilityError(DTDAError):
    """A private name of torch or Lightning that lightning-dtda depends on does not exist in the installed versions."""


class ReplayError(DTDAError):
    """A recorded run cannot be reproduced, e.g. with other data, another module or randomness that was not recorded."""


class AttributionError(DTDAError):
    """The requested attribution cannot be computed, or a stored one does not match the request."""


class ExecutionError(DTDAError):
    """Work cannot be done where it was to be done: there is no such device or cluster, or a process was lost."""


class CannotStackError(DTDAError):
    """These trainings cannot be done at once; the Trainer can do them one by one.

    Args:
        reason: What stands in the way.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason.rstrip(".")
        super().__init__(
            f"{self.reason}. These trainings cannot be stacked: do them one by one (stacked=False, --stacked false)."
        )


class RetrainingError(DTDAError):
    """The requested retraining is not possible, or a stored ground truth does not match the request."""
