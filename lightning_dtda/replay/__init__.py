"""A run as a differentiable function: losses and measurements, theta_t in either direction, adjoint products."""

from lightning_dtda.replay.drift import Drift
from lightning_dtda.replay.examples import Examples, prepare_fit, query_examples, training_examples
from lightning_dtda.replay.fingerprint import dataset_fingerprint
from lightning_dtda.replay.functional import FunctionalModule
from lightning_dtda.replay.measurements import Measurement, resolve_measurement
from lightning_dtda.replay.replay import Point, Precision, Replay, StepBatch, shape_key

__all__ = [
    "Drift",
    "Examples",
    "FunctionalModule",
    "Measurement",
    "Point",
    "Precision",
    "Replay",
    "StepBatch",
    "dataset_fingerprint",
    "prepare_fit",
    "query_examples",
    "resolve_measurement",
    "shape_key",
    "training_examples",
]
