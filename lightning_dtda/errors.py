"""The exceptions that lightning-dtda raises: what is wrong, where, and what to do about it."""


class DTDAError(Exception):
    """Base of every error that lightning-dtda raises on purpose."""


class RecordingError(DTDAError):
    """This training cannot be recorded, or its recording failed."""


class TrajectoryError(DTDAError):
    """A recorded run or ensemble is missing, damaged, incomplete or does not fit together."""


class UnknownFormatError(TrajectoryError):
    """A file is of a format that this version does not know; another version wrote it, and it may well be sound."""


class ReplayError(DTDAError):
    """A recorded run cannot be reproduced: other data, another module, or randomness that was not recorded."""


class AttributionError(DTDAError):
    """An attribution was asked for that cannot be computed, or a stored one does not fit the question."""


class ClusterError(DTDAError):
    """Work cannot be done on a Ray cluster."""


class RetrainingError(DTDAError):
    """A retraining was asked for that cannot be done, or a stored ground truth does not fit the question."""
