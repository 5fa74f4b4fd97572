"""The tracker: responses carried along with a training are those of its record, and the training is what it was."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder
from lightning_dtda.errors import RecordingError
from lightning_dtda.estimators.forward import forward_sweep
from lightning_dtda.recording import ResponseTracker
from lightning_dtda.replay import Replay, Tangents, training_examples
from tests.recording.tracked import GROUPS, QUERIES, assert_same, assert_tracked_as_recorded, membership
from tests.regression import Augmented, WeightedRegressor, weighted_data
from tests.trainings import (
    NORMALISED_NETWORKS,
    OPTIMIZERS,
    RANDOM_NETWORKS,
    TRAINERS,
    Tied,
    of,
    sgd,
    train,
)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_tracked_responses_are_those_of_the_record_for_every_optimizer(fit, tmp_path, optimizer):
    assert_tracked_as_recorded(fit, tmp_path, optimizer)


@pytest.mark.parametrize("arguments", TRAINERS.values(), ids=TRAINERS.keys())
def test_the_tracker_follows_the_trainer(fit, tmp_path, arguments):
    assert_tracked_as_recorded(fit, tmp_path, of(torch.optim.AdamW, 0.02), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("network", RANDOM_NETWORKS.values(), ids=RANDOM_NETWORKS.keys())
def test_the_tracker_follows_dropout(fit, tmp_path, network):
    assert_tracked_as_recorded(fit, tmp_path, of(torch.optim.AdamW, 0.01), network=network, accumulate_grad_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "accumulated"])
@pytest.mark.parametrize("network", NORMALISED_NETWORKS.values(), ids=NORMALISED_NETWORKS.keys())
def test_the_tracker_follows_batch_norm(fit, tmp_path, network, arguments):
    optimizer = of(torch.optim.SGD, 0.05, momentum=0.9)
    assert_tracked_as_recorded(fit, tmp_path, optimizer, network, max_epochs=3, **arguments)


def test_the_tracker_knows_tied_weights(fit, tmp_path):
    assert_tracked_as_recorded(fit, tmp_path, of(torch.optim.AdamW), network=Tied)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_tracker_takes_augmented_batches_as_they_come(fit, tmp_path, workers):
    data = {"dataset": Augmented, "workers": workers}
    assert_tracked_as_recorded(fit, tmp_path, sgd(momentum=0.9), batches="store", data=data, max_epochs=2)


def trained(fit, *callbacks, dtype=torch.float32, network=RANDOM_NETWORKS["dropout"], **arguments):
    make = functools.partial(WeightedRegressor, dtype=dtype)
    data = weighted_data(dtype=dtype)
    return train(fit, of(torch.optim.AdamW, 0.01), *data, *callbacks, make=make, network=network, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}], ids=str)
def test_the_training_is_unchanged_to_the_bit(fit, arguments):
    alone, followed = trained(fit, **arguments), trained(fit, ResponseTracker(GROUPS), **arguments)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, followed.get_parameter(name)), name


def test_the_random_numbers_after_the_training_are_unchanged(fit):
    drawn = []
    for callbacks in ([], [ResponseTracker(GROUPS)]):
        trained(fit, *callbacks)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_batch_norm_is_left_alone(fit):
    trainings = []
    for callbacks in ([], [ResponseTracker(GROUPS)]):
        network = NORMALISED_NETWORKS["BatchNorm"]
        trainings.append(train(fit, sgd(), *weighted_data(), *callbacks, network=network))
    for name, value in trainings[0].state_dict().items():
        assert torch.equal(value, trainings[1].state_dict()[name]), name


class Watches(Callback):
    """Notes the responses after each batch, and what is measured then."""

    def __init__(self, tracker):
        self.tracker, self.seen, self.measured = tracker, [], []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(self.tracker.responses.clone())
        self.measured.append(self.tracker.measure(QUERIES)[1])


def test_responses_can_be_read_after_every_step(fit, tmp_path):
    optimizer, tracker = of(torch.optim.Adam), ResponseTracker(GROUPS)
    watches = Watches(tracker)
    train(fit, optimizer, *weighted_data(), tracker, TrajectoryRecorder(tmp_path, gradients="none"), watches)
    replay = Replay(
        [*Ensemble.open(tmp_path)], WeightedRegressor(optimizer), training_examples(TensorDataset(*weighted_data()))
    )
    positions = list(forward_sweep(replay, membership(), range(1, 16)))
    assert len(positions) == len(watches.seen) == 15
    for seen, position in zip(watches.seen, positions, strict=True):
        assert_same(seen, position.tangents.theta[0])
    assert_same(watches.measured[-1], tracker.measure(QUERIES)[1])


def test_nothing_grows_with_the_number_of_steps(fit):
    sizes = []
    for epochs in (2, 20):
        tracker = ResponseTracker(GROUPS)
        trained(fit, tracker, max_epochs=epochs)
        sizes.append(sum(_bytes(value) for value in vars(tracker._tracking).values()))
        assert not tracker._tracking.watch._pending
    assert sizes[0] == sizes[1] > 0


def _bytes(value):
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    parts = vars(value).values() if isinstance(value, Tangents) else parts
    return sum(_bytes(part) for part in parts)


def test_parameters_have_their_names(fit):
    tracker = ResponseTracker(GROUPS)
    trained(fit, tracker)
    named = tracker.layout.unflatten(tracker.responses)
    assert named["net.0.weight"].shape == (3, 5, 3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lower_precisions_agree_up_to_single_precision(fit, tmp_path, precision):
    # in mixed precision too: both start from the gradients as applied, and differentiate in single
    tracker, optimizer = ResponseTracker(GROUPS), of(torch.optim.AdamW, 0.01)
    trained(fit, tracker, TrajectoryRecorder(tmp_path), network=None, precision=precision)
    data = training_examples(TensorDataset(*weighted_data(dtype=torch.float32)))
    replay = Replay([*Ensemble.open(tmp_path)], WeightedRegressor(optimizer, dtype=torch.float32), data)
    (position,) = forward_sweep(replay, membership().float())
    assert_same(tracker.responses, position.tangents.theta[0], 1e-4)


def test_a_training_that_resumes_goes_on_with_its_responses(fit, tmp_path):
    data = DataLoader(TensorDataset(*weighted_data()), batch_size=4)

    def go(tracker, epochs, *callbacks, **arguments):
        pl.seed_everything(3, verbose=False)
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[tracker, *callbacks],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
        )
        trainer.fit(WeightedRegressor(of(torch.optim.Adam)), data, **arguments)
        return tracker

    first = go(ResponseTracker(GROUPS), 2, ModelCheckpoint(tmp_path, filename="after-2"))
    checkpoint = tmp_path / "after-2.ckpt"
    whole, second = go(ResponseTracker(GROUPS), 4), go(ResponseTracker(GROUPS), 4, ckpt_path=checkpoint)
    assert_same(second.responses, whole.responses)
    assert not torch.equal(first.responses, whole.responses)
    with pytest.raises(RecordingError, match="resumes at step 6, but the responses of these groups"):
        go(ResponseTracker([[2]]), 4, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one"),
        ([[]], "non-empty"),
        ([[12]], "beyond the 12 training examples"),
        ([[-1]], "beyond the"),
        ([[1.5]], "not a list of data set indices"),
        ([[True, False, True]], "is a mask"),
        (torch.tensor([[True, False]]), "is a mask"),
        ([[3, 5, 3]], "an example twice"),
    ],
    ids=str,
)
def test_groups_that_are_none_are_refused(fit, groups, message):
    with pytest.raises(RecordingError, match=message):
        trained(fit, ResponseTracker(groups))


def test_responses_before_any_training_are_refused():
    with pytest.raises(RecordingError, match="Fit with the tracker"):
        ResponseTracker(GROUPS).responses  # noqa: B018


def test_what_the_recorder_refuses_is_refused(fit):
    with pytest.raises(RecordingError, match="cannot be followed: its step uses only signs"):
        train(fit, of(torch.optim.Rprop), *weighted_data(), ResponseTracker(GROUPS))


class Drifting(WeightedRegressor):
    """Has a loss that depends on what is no part of it."""

    scale = 1.0

    def on_train_batch_end(self, *_):
        self.scale = self.scale * 1.1

    def training_step(self, batch, batch_idx):
        return self.scale * super().training_step(batch, batch_idx)


def test_a_gradient_that_is_not_that_of_the_losses_is_found_at_its_step(fit):
    with pytest.raises(RecordingError, match="The training: the gradient of step 1"):
        train(fit, sgd(), *weighted_data(), ResponseTracker(GROUPS), make=Drifting)


class Interferes(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.net[2].bias += 0.1


def test_parameters_that_change_between_steps_are_found(fit):
    with pytest.raises(RecordingError, match="step 1"):
        train(fit, sgd(), *weighted_data(), ResponseTracker(GROUPS), Interferes())


class Logs(Logger):
    """A logger that keeps what it is given, and has tables as W&B's has."""

    name = version = "logs"

    def __init__(self):
        super().__init__()
        self.metrics, self.tables = {}, {}

    def log_hyperparams(self, *arguments):
        pass

    def log_metrics(self, metrics, step):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_table(self, key, columns, data, step):
        self.tables[step] = (key, columns, data)


def test_norms_are_logged_on_demand_with_the_most_influential_groups_of_the_batch(tmp_path):
    logs, tracker = Logs(), ResponseTracker(GROUPS, log_responses=True)
    seen, batches = {}, {}

    class Sees(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.global_step] = tracker.responses.norm(dim=1)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches[trainer.global_step + 1] = set(range(4 * batch_idx, 4 * batch_idx + 4))

    go(tracker, Sees(), logger=logs, log_every_n_steps=2)
    assert [*logs.tables] == [2, 4, 6]
    for step, (key, columns, rows) in logs.tables.items():
        norms = seen[step]
        expected = {"median_norm": norms.median(), "largest_norm": norms.max()}
        there = [number for number, group in enumerate(GROUPS) if batches[step] & {*group}]
        expected["largest_norm_in_batch"] = norms[there].max()
        logged = {name: logs.metrics[step][f"responses/{name}"] for name in expected}
        assert logged == {name: norm.item() for name, norm in expected.items()}
        assert key == "responses/most_influential_in_batch"
        assert columns == ["group", "examples", "norm of the response"]
        assert [row[0] for row in rows] == sorted(there, key=lambda number: -norms[number])
        assert [row[1] for row in rows] == [", ".join(map(str, sorted(GROUPS[row[0]]))) for row in rows]


def go(*callbacks, **arguments):
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[*callbacks],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )
    trainer.fit(WeightedRegressor(of(torch.optim.Adam)), DataLoader(TensorDataset(*weighted_data()), batch_size=4))


def test_nothing_is_logged_unless_it_is_asked_for(tmp_path):
    logs = Logs()
    go(ResponseTracker(GROUPS), logger=logs, log_every_n_steps=1)
    assert not logs.tables
    assert not [name for metrics in logs.metrics.values() for name in metrics if name.startswith("responses/")]
