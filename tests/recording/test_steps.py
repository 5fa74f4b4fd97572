"""What is recorded of a step is what the Trainer did at that step: bit by bit, by a route of its own."""

import logging
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.recording import shard_buffer
from lightning_dtda.trajectory import writer
from lightning_dtda.units import human_bytes
from tests.recording.modules import (
    Regressor,
    adamw,
    assert_same,
    loader,
    parameters_of,
    sgd,
    shuffled,
    two_groups_with_a_scheduler,
)


class Watch(pl.Callback):
    """Notes, beside the recorder, what each step started from, applied and led to."""

    def __init__(self):
        self.thetas = []
        self.gradients = []
        self.learning_rates = []

    def on_train_start(self, trainer, pl_module):
        self.thetas.append(parameters_of(pl_module))
        self._named = dict(pl_module.named_parameters())
        trainer.optimizers[0].register_step_post_hook(self._note)

    def _note(self, optimizer, args, kwargs):
        self.thetas.append({name: parameter.detach().clone() for name, parameter in self._named.items()})
        self.gradients.append({name: parameter.grad.clone() for name, parameter in self._named.items()})
        self.learning_rates.append([group["lr"] for group in optimizer.param_groups])


def nesterov(module):
    return torch.optim.SGD(module.parameters(), lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.1)


def plain(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def rmsprop(module):
    return torch.optim.RMSprop(module.parameters(), lr=0.003, momentum=0.5, centered=True)


def adagrad(module):
    return torch.optim.Adagrad(module.parameters(), lr=0.03, initial_accumulator_value=0.1, lr_decay=0.01)


OPTIMIZERS = {
    "plain": plain,
    "momentum": sgd,
    "nesterov": nesterov,
    "two groups": two_groups_with_a_scheduler,
    "AdamW": adamw,
    "RMSprop": rmsprop,
    "Adagrad": adagrad,
}


@pytest.mark.parametrize("checkpoint_every", ["sqrt", "all", 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_theta_is_what_the_trainer_had_at_every_step(record, optimizer, checkpoint_every):
    watch = Watch()

    run = record(Regressor(optimizer), shuffled(), watch, max_epochs=2, recorder={"checkpoint_every": checkpoint_every})

    assert run.steps == 12
    for step in [*range(13), 3, 11, 0]:  # forwards, then anywhere
        assert_same(run.theta(step), watch.thetas[step])


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}], ids=["each batch", "accumulated"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradient_is_what_the_optimizer_applied(record, optimizer, arguments):
    watch = Watch()

    run = record(Regressor(optimizer, dropout=0.2), shuffled(), watch, max_epochs=2, **arguments)

    assert run.steps == len(watch.gradients)
    for step, gradient in enumerate(watch.gradients):
        assert_same(run.gradient(step), gradient)


class GradientsBeforeTheStep(pl.Callback):
    """Notes each gradient before the optimizer may write over it."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()})


def nesterov_that_writes_over_gradients(module):
    """As on a GPU, where ``foreach`` is what torch chooses itself."""
    return torch.optim.SGD(module.parameters(), lr=0.03, momentum=0.8, nesterov=True, foreach=True)


def test_gradient_is_the_applied_one_where_the_optimizer_writes_over_it(record):
    before, after = GradientsBeforeTheStep(), Watch()

    run = record(Regressor(nesterov_that_writes_over_gradients), shuffled(), before, after, max_epochs=2)

    first, changed = before.gradients[0], after.gradients[0]
    assert any(not torch.equal(first[name], changed[name]) for name in first)
    for step, gradient in enumerate(before.gradients):
        assert_same(run.gradient(step), gradient)


class NormsBeforeClipping(pl.Callback):
    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_recorded_as_clipped_and_norms_as_they_were(record, algorithm):
    torch.manual_seed(7)  # some norms are to be above the limit, some below
    watch, before = Watch(), NormsBeforeClipping()

    run = record(
        Regressor(),
        shuffled(),
        watch,
        before,
        max_epochs=3,
        gradient_clip_val=0.6,
        gradient_clip_algorithm=algorithm,
        recorder={"checkpoint_every": 7},
    )

    for step, (theta, gradient) in enumerate(zip(watch.thetas[:-1], watch.gradients, strict=True)):
        assert_same(run.theta(step), theta)
        assert_same(run.gradient(step), gradient)
    if algorithm == "norm":
        assert min(before.norms) < 0.6 < max(before.norms)  # some are clipped, some are not
        torch.testing.assert_close(
            torch.stack([run.gradient_norm(step) for step in range(run.steps)]), torch.stack(before.norms)
        )
    else:
        with pytest.raises(TrajectoryError, match="not clipped by norm"):
            run.gradient_norm(0)


def test_double_precision_is_recorded_in_double_precision(record):
    watch = Watch()

    run = record(
        Regressor(), shuffled(), watch, max_epochs=1, precision="64-true", recorder={"checkpoint_every": "all"}
    )

    assert run.manifest.dtype == "float64"
    for step, theta in enumerate(watch.thetas):
        assert_same(run.theta(step), theta)


def test_bfloat16_gradients_are_the_applied_ones_rounded(record):
    watch = Watch()

    run = record(Regressor(), shuffled(), watch, max_epochs=1, recorder={"gradients": "bfloat16"})

    for step, gradient in enumerate(watch.gradients):
        assert_same(run.gradient(step), {name: tensor.bfloat16() for name, tensor in gradient.items()})


@pytest.mark.parametrize("seconds", [0, 0.01], ids=["fast disk", "slow disk"])
def test_memory_for_gradients_is_used_again_but_not_before_it_is_on_disk(record, monkeypatch, seconds):
    made, watch = [], Watch()
    memory, write = shard_buffer.ShardBuffer._memory, writer.write_tensors

    def note(*arguments, **options):
        made.append(memory(*arguments, **options))
        return made[-1]

    def wait_for_the_disk(path, *arguments):
        time.sleep(seconds)
        return write(path, *arguments)

    monkeypatch.setattr(shard_buffer.ShardBuffer, "_memory", note)
    monkeypatch.setattr(writer, "write_tensors", wait_for_the_disk)
    monkeypatch.setattr(shard_buffer, "SHARD_BYTES", 1)  # each step a shard of its own

    run = record(Regressor(), shuffled(), watch, max_epochs=6, recorder={"checkpoint_every": 100})

    assert (run.steps, len(run.manifest.shards)) == (36, 36)
    for step, gradient in enumerate(watch.gradients):
        assert_same(run.gradient(step), gradient)
    # one is filled or waits for a place in the queue, one is written, the others are in the queue
    assert 1 <= len(made) <= writer._QUEUE_LENGTH + 2


@pytest.mark.parametrize(
    ("recorder", "disk", "memory"),
    [
        # 12 steps of 36 parameters with momentum; 4 files at once
        ({"gradients": "none", "checkpoint_every": 4}, 5 * 2 * 36 * 4, 4 * 2 * 36 * 4),
        ({"gradients": "float32", "checkpoint_every": 4}, 12 * 36 * 4 + 5 * 2 * 36 * 4, 4 * 4 * 36 * 4),
        ({"gradients": "bfloat16", "checkpoint_every": 12}, 12 * 36 * 2 + 3 * 2 * 36 * 4, 4 * 12 * 36 * 2),
    ],
)
def test_what_a_recording_needs_is_announced_before_the_first_step(record, caplog, recorder, disk, memory):
    caplog.set_level(logging.INFO, "lightning_dtda")

    run = record(Regressor(), shuffled(), max_epochs=2, recorder=recorder)

    assert (run.steps, run.layout.size) == (12, 36)
    [announced] = [message for message in caplog.messages if message.startswith("Recording ")]
    assert f"about {human_bytes(disk)} of disk space and at most {human_bytes(memory)} of memory" in announced


def test_frozen_parameters_are_announced_once(record, caplog):
    caplog.set_level(logging.INFO, "lightning_dtda")
    module = Regressor()
    module.frozen = torch.nn.Parameter(torch.zeros(1000), requires_grad=False)

    run = record(module, shuffled(), max_epochs=2, recorder={"gradients": "none", "checkpoint_every": 4})

    [announced] = [message for message in caplog.messages if message.startswith("Recording ")]
    assert f"about {human_bytes(5 * 2 * 36 * 4 + 4000)} of disk space" in announced
    files = sorted(run.path.glob("checkpoint-*"), key=lambda file: file.stat().st_size)
    assert len(files) == 4
    assert files[-2].stat().st_size < 4000 < files[-1].stat().st_size


def test_learning_rates_are_those_of_the_very_step(record):
    watch = Watch()

    run = record(Regressor(two_groups_with_a_scheduler), shuffled(), watch, max_epochs=2)

    assert [run.learning_rates(step).tolist() for step in range(run.steps)] == watch.learning_rates
    # as the scheduler's formula has them
    assert run.learning_rates(3).tolist() == pytest.approx([0.1 * 0.9**3, 0.03 * 0.9**3])


def test_hyperparameters_are_those_of_each_group(record):
    run = record(Regressor(two_groups_with_a_scheduler), shuffled(), max_epochs=1)

    first, second = run.hyperparameters(0)
    assert first == {**second, "lr": 0.1, "weight_decay": 0.01}
    assert second == {
        "lr": 0.03,
        "momentum": 0.8,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    }
    assert run.layout.names == ("net.3.weight", "net.3.bias", "net.0.weight", "net.0.bias")


def test_recorded_random_states_draw_the_same_dropout_masks_again(record):
    module, data = Regressor(dropout=0.5), shuffled()
    run = record(module, data, max_epochs=2, accumulate_grad_batches=2)

    for step in range(run.steps):
        module.load_state_dict(run.theta(step))
        module.zero_grad()
        for part in run.micro_batches(step):
            torch.set_rng_state(part.rng_states["cpu"])
            batch = data.collate_fn([data.dataset[index] for index in part.indices])
            (module.training_step(batch, part.batch_idx) / 2).backward()
        assert_same({name: p.grad for name, p in module.named_parameters()}, run.gradient(step))


def test_no_random_states_are_kept_where_no_number_is_drawn(record):
    run = record(Regressor(dropout=0.0), shuffled(), max_epochs=1)

    assert not any(part.rng_states for step in range(run.steps) for part in run.micro_batches(step))


@pytest.mark.parametrize(
    ("checkpoint_every", "steps"),
    [("all", list(range(13))), ("sqrt", [0, 4, 8, 12]), (5, [0, 5, 10, 12]), (100, [0, 12])],
)
def test_checkpoints_are_as_far_apart_as_asked_for(record, checkpoint_every, steps):
    run = record(Regressor(), shuffled(), max_epochs=2, recorder={"checkpoint_every": checkpoint_every})

    assert run.checkpoint_steps == steps


def test_a_training_of_unknown_length_is_recorded_without_gradients_and_with_few_checkpoints(record):
    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 103

    run = record(Regressor(), loader(batch_size=23), Enough(), max_epochs=-1)

    assert run.manifest.planned_steps is None
    assert run.manifest.gradients == "none"
    assert run.checkpoint_steps == [0, 100, 103]


def test_checkpoints_hold_the_momentum(record):
    module = Regressor()
    run = record(module, shuffled(), max_epochs=1, recorder={"checkpoint_every": 6})
    optimizer = module.trainer.optimizers[0]

    [state] = run.checkpoint(6).states

    momentum = [optimizer.state[parameter]["momentum_buffer"].flatten() for parameter in module.parameters()]
    assert torch.equal(state["momentum_buffer"], torch.cat(momentum))


def test_checkpoints_hold_buffers_and_the_first_one_frozen_parameters(record):
    module = Regressor(plain)
    module.register_buffer("counter", torch.arange(3))
    module.net[0].requires_grad_(False)

    run = record(module, shuffled(), max_epochs=1)

    assert run.layout.names == ("net.3.weight", "net.3.bias")
    assert_same(
        run.checkpoint(0).buffers,
        {"counter": torch.arange(3), "net.0.weight": module.net[0].weight, "net.0.bias": module.net[0].bias},
    )
    assert_same(run.checkpoint(6).buffers, {"counter": torch.arange(3)})


def test_parameters_set_in_a_hook_before_the_first_batch_are_the_initial_ones(record):
    class Rescaled(Regressor):
        def on_train_start(self):
            with torch.no_grad():
                self.net[0].weight.zero_()

    run = record(Rescaled(), shuffled(), max_epochs=1)

    assert not run.theta(0)["net.0.weight"].any()


@pytest.mark.parametrize(
    ("recorder", "stored"),
    [
        ({}, "float32"),
        ({"gradients_budget": 1e-9}, "none"),  # one byte
        ({"gradients": "float32", "gradients_budget": 1e-9}, "float32"),
        ({"gradients": "none"}, "none"),
    ],
)
def test_auto_gradients_are_kept_within_the_budget(record, recorder, stored):
    run = record(Regressor(), loader(), max_epochs=1, recorder=recorder)

    assert run.manifest.gradients == stored


def test_the_optimizers_state_gains_nothing_from_being_recorded(fit, record):
    states = []
    for train in (fit, record):
        pl.seed_everything(7, verbose=False)
        module = Regressor(plain)
        train(module, shuffled(), max_epochs=1)
        states.append(module.trainer.optimizers[0].state_dict())

    assert states[0] == states[1]


class Cutting(Regressor):
    """Lightning ends the epoch where this hook returns -1."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


class WithoutALoss(Regressor):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 2 else loss


def test_micro_batches_whose_gradients_are_thrown_away_are_no_part_of_a_step(record):
    # the epoch ends before the second group is complete; the next one starts with a gradient of zero
    run = record(Cutting(), loader(), max_epochs=2, accumulate_grad_batches=2)
    steps = [[(part.epoch, part.batch_idx) for part in run.micro_batches(t)] for t in range(run.steps)]
    assert steps == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]


def test_a_micro_batch_without_a_loss_is_no_part_of_a_step(record):
    run = record(WithoutALoss(), loader(), max_epochs=1, accumulate_grad_batches=2)
    assert [[part.batch_idx for part in run.micro_batches(t)] for t in range(run.steps)] == [[0, 1], [3], [4, 5]]


class Drawing(pl.Callback):
    def on_train_batch_end(self, *args):
        torch.randn(1)


def test_random_numbers_of_other_callbacks_are_not_those_of_the_step(record):
    run = record(Regressor(), shuffled(), Drawing(), max_epochs=1)
    assert not any(part.rng_states for t in range(run.steps) for part in run.micro_batches(t))


class GrowingBatches(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.train_dataloader.batch_sampler.batch_size = 8


def test_a_callback_that_changes_the_batch_sampler_is_heard(record):
    run = record(Regressor(), loader(), GrowingBatches(), max_epochs=2)
    assert [len(run.batch_indices(t)) for t in range(run.steps)] == [4, 4, 4, 4, 4, 3, 8, 8, 7]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_mixed_precision_is_recorded_as_applied(record, clip):
    watch = Watch()
    run = record(Regressor(adamw), shuffled(), watch, max_epochs=2, precision="bf16-mixed", gradient_clip_val=clip)

    for step, gradient in enumerate(watch.gradients):
        assert_same(run.gradient(step), gradient)
        assert_same(run.theta(step), watch.thetas[step])
    assert run.manifest.configuration["training"]["precision"] == "bf16-mixed"


class Skipping(torch.amp.GradScaler):
    """On the CPU, finds a gradient that is not finite at every third step."""

    def __init__(self):
        super().__init__("cpu", init_scale=8.0)
        self.calls = 0

    def step(self, optimizer, *args, **kwargs):
        self.calls += 1
        if self.calls % 3 == 0:
            next(iter(self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())).fill_(1.0)
        return super().step(optimizer, *args, **kwargs)


def test_steps_that_a_gradient_scaler_skips_are_none(record):
    watch, plugin = Watch(), MixedPrecision("16-mixed", "cpu", Skipping())
    run = record(Regressor(), loader(), watch, max_epochs=2, plugins=[plugin])

    passes = [(part.epoch, part.batch_idx) for step in range(run.steps) for part in run.micro_batches(step)]
    assert passes == [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0), (1, 1), (1, 3), (1, 4)]
    for step, gradient in enumerate(watch.gradients):
        assert_same(run.gradient(step), gradient)  # unscaled
        assert_same(run.theta(step), watch.thetas[step])
