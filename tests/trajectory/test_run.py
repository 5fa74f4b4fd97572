"""A run gives back what was written, and rebuilds the parameters in between."""

import pytest
import torch

from lightning_dtda import Run
from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory import RunWriter
from tests.trajectory.runs import CHECKPOINTS, LAYOUT, SHAPES, SHARDS, STEPS, manifest, records, write_run


def test_theta_is_rebuilt_between_checkpoints_as_the_optimizer_went(tmp_path):
    written = write_run(tmp_path / "run")

    assert written.run.checkpoint_steps == list(CHECKPOINTS)
    for step in [*range(STEPS + 1), *reversed(range(STEPS + 1)), 2, 6, 4]:  # in any order
        assert torch.equal(written.run.theta_vector(step), written.thetas[step]), step


def test_vectors_are_split_into_the_named_parameters(tmp_path):
    written = write_run(tmp_path / "run")

    for vector, named in [
        (written.thetas[4], written.run.theta(4)),
        (written.gradients[4], written.run.gradient(4)),
    ]:
        assert torch.equal(named["weight"], vector[:6].reshape(3, 2))
        assert torch.equal(named["bias"], vector[6:])


def test_steps_are_found_across_shards(tmp_path):
    run = write_run(tmp_path / "run").run

    assert [run.batch_indices(step).tolist() for step in (0, 2, 3, 6, 1)] == [
        [0, 1, 2],
        [6, 7, 8],
        [9, 0, 1],
        [8, 9, 0],
        [3, 4, 5],
    ]
    assert [part.batch_idx for part in run.micro_batches(5)] == [10, 11]


def test_coefficients_are_the_weights_in_the_mean_of_means(tmp_path):
    run = write_run(tmp_path / "run").run

    assert run.coefficients(3).tolist() == [1 / 4, 1 / 4, 1 / 2]


def test_hyperparameters_are_numbers_and_settings(tmp_path):
    run = write_run(tmp_path / "run").run

    assert run.learning_rates(4).tolist() == [0.1, 0.2]
    assert run.hyperparameters(4)[1] == {
        "lr": 0.2,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.01,
        "nesterov": False,
        "maximize": False,
    }


def test_random_states_belong_to_their_micro_batches_and_can_be_set(tmp_path):
    (tmp_path / "run").mkdir()
    writer = RunWriter(tmp_path / "run", manifest(gradients="none"))
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    others = [torch.tensor([7, 8, 9], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8)]  # of no fixed length
    drawing = {
        "rng_states.cpu": torch.cat(states),
        "rng_sizes.cpu": torch.tensor([len(state) for state in states]),
        "rng_micro_batches.cpu": torch.tensor([1, 2]),
        "rng_states.own.0": torch.cat(others),
        "rng_sizes.own.0": torch.tensor([3, 1]),
        "rng_micro_batches.own.0": torch.tensor([0, 2]),
    }
    writer.add_shard(0, 2, {**records(0, 2, None), **drawing})
    writer.close("complete")

    run = Run(tmp_path / "run")
    micro_batches = [part for step in range(2) for part in run.micro_batches(step)]

    assert [sorted(part.rng_states) for part in micro_batches] == [["own.0"], ["cpu"], ["cpu", "own.0"], []]
    for part, state in zip(micro_batches[1:3], states, strict=True):
        assert torch.equal(torch.Generator().set_state(part.rng_states["cpu"]).get_state(), state)
    for number, state in zip((0, 2), others, strict=True):
        assert torch.equal(micro_batches[number].rng_states["own.0"], state)


@pytest.mark.parametrize("step", [-1, STEPS + 1])
def test_parameters_of_a_step_that_never_was_are_refused(tmp_path, step):
    run = write_run(tmp_path / "run").run

    with pytest.raises(TrajectoryError, match=f"no step {step}; it has steps 0 to 7"):
        run.theta(step)


@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_a_run_that_is_cut_is_its_own_beginning(tmp_path, steps):
    written = write_run(tmp_path / "run")
    cut = written.run.manifest
    cut.cut(steps)
    cut.save(tmp_path / "run")

    run = Run(tmp_path / "run")

    assert run.steps == steps
    for step in range(steps + 1):
        assert torch.equal(run.theta_vector(step), written.thetas[step])
    for step in range(steps):
        assert torch.equal(run.gradient_vector(step), written.gradients[step])
    with pytest.raises(TrajectoryError, match="no record"):
        run.batch_indices(steps)


@pytest.mark.parametrize("step", [-1, STEPS])
def test_the_record_of_a_step_that_never_was_is_refused(tmp_path, step):
    run = write_run(tmp_path / "run").run

    with pytest.raises(TrajectoryError, match=f"no record of step {step}; it has 7 steps"):
        run.batch_indices(step)


def test_without_gradients_only_the_checkpoints_can_be_read(tmp_path):
    written = write_run(tmp_path / "run", with_gradients=False, gradients="none")

    for step in CHECKPOINTS:
        assert torch.equal(written.run.theta_vector(step), written.thetas[step])
    with pytest.raises(TrajectoryError, match=r"no checkpoint at step 4 .*checkpoint_every"):
        written.run.theta(4)
    with pytest.raises(TrajectoryError, match=r'recorded without gradients.*gradients="float32"'):
        written.run.gradient(4)


def test_a_run_that_was_killed_at_its_first_checkpoint_has_the_initial_parameters(tmp_path):
    (tmp_path / "run").mkdir()
    writer = RunWriter(tmp_path / "run", manifest())
    with pytest.raises(TrajectoryError, match="before its initial parameters"):
        Run(tmp_path / "run").theta(0)

    writer.add_checkpoint(0, {f"parameters.{name}": torch.ones(shape) for name, shape in SHAPES.items()})
    writer.close("recording")

    assert torch.equal(Run(tmp_path / "run").theta_vector(0), torch.ones(LAYOUT.size))


def test_files_are_read_one_shard_at_a_time(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run").run
    read = []
    original = type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: read.append(path.name) or original(path))

    for step in range(STEPS):
        run.batch_indices(step)

    assert read == [f"steps-{first:08d}.safetensors" for first, _ in SHARDS]
