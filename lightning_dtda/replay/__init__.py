"""A run as a differentiable function: recorded steps replayed forwards or backwards, with adjoint products."""

from lightning_dtda.replay.drift import Drift
from lightning_dtda.replay.eager import Eager, Products
from lightning_dtda.replay.examples import Examples, prepare_fit, query_examples, query_names, training_examples
from lightning_dtda.replay.fingerprint import dataset_fingerprint, refuse_changed_data
from lightning_dtda.replay.measurements import Measurement, resolve_measurement
from lightning_dtda.replay.measuring import Draws
from lightning_dtda.replay.records import shape_key
from lightning_dtda.replay.replay import Precision, Replay
from lightning_dtda.replay.steps import Point, StepBatch
from lightning_dtda.replay.tangents import Position, Tangents

__all__ = [
    "Draws",
    "Drift",
    "Eager",
    "Examples",
    "Measurement",
    "Point",
    "Position",
    "Precision",
    "Products",
    "Replay",
    "StepBatch",
    "Tangents",
    "dataset_fingerprint",
    "prepare_fit",
    "query_examples",
    "query_names",
    "refuse_changed_data",
    "resolve_measurement",
    "shape_key",
    "training_examples",
]
