"""Stand-ins for the Trainer and the optimizer during a replay: they answer from the record, and train nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus

from lightning_dtda.errors import ReplayError
from lightning_dtda.optimizers import Hyperparameters
from lightning_dtda.trajectory import Manifest


class Time(NamedTuple):
    """The time of a training as visible to ``training_step``.

    Args:
        epoch: The Trainer's ``current_epoch``.
        step: The Trainer's ``global_step``.
        batch_idx: The ``batch_idx`` passed to ``training_step``.
        hyperparameters: Hyperparameters of each parameter group at this step; empty if they are unknown.
    """

    epoch: int = 0
    step: int = 0
    batch_idx: int = 0
    hyperparameters: Sequence[Hyperparameters] = ()


@dataclass(frozen=True)
class Circumstances:
    """Facts about a training, other than batch, parameters and time, on which ``training_step`` may depend.

    Args:
        precision: Precision of the Trainer: ``"32-true"``, ``"bf16-mixed"``, ...
        trainer: Constant attributes of the Trainer: ``max_epochs``, ``num_training_batches``, ...
        evaluation_modules: Names of submodules that are in evaluation mode during training.
        updated_buffers: Names of buffers that a training step changes.
        transfer_hooks: Names of overridden batch transfer hooks, each with its owner: ``"module"`` or
            ``"datamodule"``.
        kernels: Names of the switchable torch kernels that were on; ``None`` for those that are on during the replay.
    """

    precision: str = "32-true"
    trainer: Mapping[str, Any] = field(default_factory=dict)
    evaluation_modules: Sequence[str] = ()
    updated_buffers: Sequence[str] = ()
    transfer_hooks: Mapping[str, str] = field(default_factory=dict)
    kernels: Sequence[str] | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Circumstances:
        """Return the circumstances of a recorded run."""
        precision = manifest.configuration["training"]["precision"]
        return cls(precision=precision, evaluation_modules=manifest.evaluation_modules, **manifest.circumstances)

    def content(self) -> dict[str, Any]:
        """Return the fields that :meth:`of` does not find elsewhere in a manifest, as JSON data."""
        return {
            "trainer": dict(self.trainer),
            "updated_buffers": list(self.updated_buffers),
            "transfer_hooks": dict(self.transfer_hooks),
            "kernels": None if self.kernels is None else list(self.kernels),
        }


class ReplayTrainer:
    """Stands in for the Trainer, with the time, its recorded attributes, and loggers that discard everything.

    Args:
        facts: Recorded attributes, as in :attr:`Circumstances.trainer`.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.time = Time()
        self.datamodule: Any = None
        self.lightning_module: Any = None
        self.training = True
        self.testing = self.validating = self.predicting = self.sanity_checking = self.evaluating = False
        self.state = TrainerState(status=TrainerStatus.RUNNING, fn=TrainerFn.FITTING, stage=RunningStage.TRAINING)
        self.strategy = SingleDeviceStrategy()
        self.should_stop = self.interrupted = False
        self.is_global_zero = True
        self.global_rank = self.local_rank = self.node_rank = 0
        self.world_size = self.num_nodes = self.num_devices = 1
        self.logger = DummyLogger()
        self.loggers = [self.logger]
        self.callbacks: list[Any] = []
        self.callback_metrics: dict[str, Any] = {}
        self.logged_metrics: dict[str, Any] = {}
        self.progress_bar_metrics: dict[str, Any] = {}
        for name, value in facts.items():
            setattr(self, name, value)

    @property
    def current_epoch(self) -> int:
        """The epoch of the recorded step."""
        return self.time.epoch

    @property
    def global_step(self) -> int:
        """The global step of the recorded step."""
        return self.time.step

    @property
    def optimizers(self) -> list[ReplayOptimizer]:
        """A single optimizer with the hyperparameters of the recorded step."""
        return [ReplayOptimizer(self.time.hyperparameters)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ReplayError(
            f"The module reads self.trainer.{name}, which is not recorded. Do not read it in training_step; keep "
            "values that the loss depends on in the module or its batches."
        )


class ReplayOptimizer:
    """Stands in for the optimizer and its scheduler, with the hyperparameters of the recorded step.

    Args:
        hyperparameters: Hyperparameters of each parameter group.
    """

    def __init__(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        self.param_groups = [dict(group) for group in hyperparameters]

    def get_last_lr(self) -> list[Any]:
        """Return the learning rates, like a scheduler."""
        return [group["lr"] for group in self.param_groups]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ReplayError(
            f"training_step uses {name} of its optimizer or scheduler, which is not recorded; only param_groups and "
            "get_last_lr() are. Keep other values that the loss depends on in the module or its batches."
        )
