"""The callback that differentiates a training while it runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import checks
from lightning_dtda.recording.averaging import averaging_callback
from lightning_dtda.recording.batch_tap import BatchTap
from lightning_dtda.recording.data import TrainingData, read_batch
from lightning_dtda.recording.response_logging import log_norms
from lightning_dtda.recording.response_tracking import ResponseTracking, rows_of_batch
from lightning_dtda.recording.step_callback import StepCallback
from lightning_dtda.recording.trial import try_step
from lightning_dtda.replay import Draws, Examples, Measurement, Tangents, query_examples, resolve_measurement
from lightning_dtda.replay.measuring import measure_with_gradients
from lightning_dtda.replay.tangents import changes
from lightning_dtda.trajectory import MicroBatch, ParameterLayout
from lightning_dtda.units import is_quantity

_GRADIENT_BYTES = 2**28
"""Maximum size in bytes of the gradients of queries that are computed together."""


class ResponseTracker(StepCallback):
    r"""Computes the responses of groups of examples while a training runs, without recording it.

    .. math:: r_{k,t} = -\sum_{n \in S_k} \frac{d \theta_t}{d w_n}, \qquad r_{k,0} = 0

    This is unrolled differentiation in forward mode (arXiv 2506.12965, equation 6): after each step, the responses are
    propagated through its derivative. The result is the same as for a recorded run, but the memory does not depend on
    the length of the training: each group needs one copy of the parameters and of the optimizer's state. At each step,
    a group takes about as long as two training steps. The training itself is unchanged, bit for bit.

    A training that resumes from a Trainer's checkpoint continues with the responses stored in it.

    Args:
        groups: Data set indices of the examples in each of K removals.
        tolerance: Largest difference between a recomputed gradient and the applied one that is attributed to rounding,
            relative to the norm of the applied gradient.
        log_responses: Whether to log the norms of the responses :math:`|r_{k,t}|` to the Trainer's loggers, every
            ``log_every_n_steps`` steps: ``responses/median_norm`` and ``responses/largest_norm`` over groups, and
            ``responses/largest_norm_in_batch`` over those with an example in the step's last batch. With a logger that
            has tables (``WandbLogger``), ``responses/most_influential_in_batch`` lists up to five of these groups.

    Raises:
        RecordingError: At the start of ``fit``, if :class:`~lightning_dtda.TrajectoryRecorder` would refuse the
            training, if there are several processes, or if a group contains anything but examples. During the training,
            if a step cannot be reproduced.

    Example:
        >>> tracker = ResponseTracker(groups=[[0], [3, 17]])
        >>> trainer = pl.Trainer(callbacks=[tracker], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, groups: Sequence[Sequence[int]], tolerance: float = 1e-3, log_responses: bool = False) -> None:
        super().__init__()
        if not (is_quantity(tolerance) and tolerance > 0):
            raise RecordingError(f"tolerance={tolerance!r} must be positive.")
        if not isinstance(groups, Iterable):
            raise RecordingError(f"groups={groups!r} must contain at least one list of data set indices.")
        self.groups = [_indices(group) for group in groups]
        if not self.groups:
            raise RecordingError("groups must contain at least one list of data set indices.")
        self.tolerance = tolerance
        self.log_responses = log_responses
        self._batch: set[int] = set()
        self._follower: ResponseTracking | None
        self._tracking: ResponseTracking | None = None

    @property
    def responses(self) -> Tensor:
        """Change of the parameters when each group is removed ``(groups, P)``, after the last step so far."""
        return self._followed.tangents.theta[0]

    @property
    def layout(self) -> ParameterLayout:
        """Position of each parameter: ``layout.unflatten(responses)`` returns the responses by parameter name."""
        return self._followed.layout

    def measure(
        self, queries: DataLoader[Any] | Dataset[Any], measurement: str | Measurement = "loss"
    ) -> tuple[Tensor, Tensor]:
        """Return the measurement after the last step so far, and its change when each group is removed.

        Args:
            queries: Q inputs to measure.
            measurement: Measurement as for :func:`~lightning_dtda.attribute`.

        Returns:
            Baseline ``(queries,)`` and responses ``(queries, groups)``.

        Raises:
            AttributionError: If the measurement cannot be differentiated or is not finite.
        """
        followed = self._followed
        theta = followed.theta
        examples = query_examples(queries, Examples([0], followed.collate_fn))  # type: ignore[arg-type]
        _, function = resolve_measurement(measurement)
        size = max(1, _GRADIENT_BYTES // (theta.shape[1] * theta.dtype.itemsize))
        baseline, responses = [], []
        for numbers in torch.arange(len(examples)).split(size):
            values, gradients, of_statistics = measure_with_gradients(
                followed.eager,
                theta,
                followed.current_buffers(),
                examples,
                numbers.tolist(),
                function,
                ["its end"],
                followed.time,
                Draws(),
            )
            baseline.append(values[0])
            responses.append(changes(gradients, of_statistics, followed.tangents)[0])
        return torch.cat(baseline), torch.cat(responses)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        checks.refuse_trainer(trainer, pl_module)
        if (callback := averaging_callback(trainer)) is not None:
            raise RecordingError(
                f"{type(callback).__name__} replaces the parameters by an average at the end, which ResponseTracker "
                "does not support. Record the training and attribute the record, or remove the callback."
            )
        if trainer.world_size > 1:
            raise RecordingError(
                f"The training has {trainer.world_size} processes, and none of them sees all examples of a step. Train "
                "with devices=1, or record the training and attribute the record."
            )
        self._tracking = None
        self._tap = BatchTap(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._tap is not None
        # batches are used as they are, so examples may differ each time they are read
        self._data = TrainingData(self._tap.loader, stored=True)
        for group in self.groups:
            if not 0 <= group[0] <= group[-1] < len(self._data):
                raise RecordingError(
                    f"The group {group} has indices beyond the {len(self._data)} training examples. Use indices from "
                    f"0 to {len(self._data) - 1}."
                )
        if not trainer.global_step:
            self._resumed = None  # the checkpoint, if any, was saved before the first step
        elif self._resumed is None or self._resumed["groups"] != self.groups:
            raise RecordingError(
                f"The training resumes at step {trainer.global_step}, but the responses of these groups up to this "
                "step are not known. Train from the start (no ckpt_path), or resume from a checkpoint that was saved "
                "while a ResponseTracker with the same groups was among the Trainer's callbacks."
            )
        self._optimizer(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        micro_batch, collated = self._take_batch(trainer, batch_idx)
        if self._follower is None:
            # not at the start of the training: hooks before the first batch may still change parameters and modes
            self._follower = self._tracking = self._begin(trainer, pl_module, micro_batch, collated)
        self._follower.begin_micro_batch(micro_batch, trainer.accumulate_grad_batches, collated)
        self._batch = set(micro_batch.indices.tolist())

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        followed = self._follower is not None and self._followed.watch.is_between_steps
        if self.log_responses and followed and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            log_norms(trainer, self.responses.norm(dim=1), self.groups, self._batch)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._tracking is None:
            return {}
        tangents = self._tracking.tangents
        return {
            "groups": self.groups,
            "steps": self._tracking.watch.steps,
            "theta": tangents.theta,
            "states": tangents.states,
            "statistics": tangents.statistics,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict or None

    def _begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, micro_batch: MicroBatch, collated: Any
    ) -> ResponseTracking:
        assert self._tap is not None
        loader, optimizer = self._tap.loader, self._optimizer(trainer)
        rows = partial(rows_of_batch, collated, micro_batch.indices, partial(read_batch, loader))
        trial = try_step(trainer, pl_module, optimizer, micro_batch, rows)
        like = pl_module.get_parameter(trial.layout.names[0]).detach()
        membership = like.new_zeros(len(self.groups), len(self._data))
        for number, group in enumerate(self.groups):
            membership[number, group] = 1
        return ResponseTracking(
            trainer=trainer,
            module=pl_module,
            eager=trial.eager,
            optimizer=optimizer,
            loader=loader,
            membership=membership,
            tolerance=self.tolerance,
            **_resumed(self._resumed, like),
        )

    def _close(self) -> None:
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    def _stop(self) -> None:
        self._release()
        self._close()

    @property
    def _followed(self) -> ResponseTracking:
        if self._tracking is None:
            raise RecordingError("There are no responses yet. Fit with the tracker among the Trainer's callbacks.")
        return self._tracking


def _indices(group: Sequence[int]) -> list[int]:
    """Return the indices of a group in ascending order."""
    try:
        given = group.tolist() if hasattr(group, "tolist") else list(group)
        indices = sorted(map(operator.index, given))  # not int(), which accepts 1.5
    except TypeError as error:
        raise RecordingError(f"The group {group!r} is not a list of data set indices.") from error
    if any(isinstance(index, bool) for index in given):
        raise RecordingError(f"The group {group!r} is a mask. Use the indices of its examples instead.")
    if not indices:
        raise RecordingError("groups contains an empty list. Each group must be a non-empty list of data set indices.")
    if len(set(indices)) != len(indices):
        raise RecordingError(f"The group {group!r} contains an example twice. List each index once.")
    return indices


def _resumed(state: dict[str, Any] | None, like: Tensor) -> dict[str, Any]:
    """Return steps and tangents of a checkpoint, on the device of the training."""
    if state is None:
        return {}
    tangents = Tangents(
        state["theta"].to(like),
        [{key: part.to(like) for key, part in of_group.items()} for of_group in state["states"]],
        {name: part.to(like) for name, part in state["statistics"].items()},
    )
    return {"steps": state["steps"], "tangents": tangents}
