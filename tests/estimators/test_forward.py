"""Forward mode: the same derivatives as reverse mode has, at any step on the way, in memory that does not grow."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.estimators.forward import estimate_forward, forward_sweep
from lightning_dtda.estimators.removals import Removals
from lightning_dtda.estimators.sweep_costs import forward_costs
from lightning_dtda.replay import Replay, query_examples, resolve_measurement, training_examples
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

TOLERANCE = 1e-9
"""Relative to the largest response, in double precision; at most 5e-11 is reached."""

QUERIES = TensorDataset(*weighted_data(4, seed=1))


def record(fit, root, optimizer, gradients="float32", batches="indices", **arguments):
    train(fit, optimizer, *weighted_data(), TrajectoryRecorder(root, gradients=gradients, batches=batches), **arguments)


def answer(root, optimizer, network=None, dtype=torch.float64, queries=QUERIES, **settings):
    return attribute(
        Ensemble.open(root),
        WeightedRegressor(optimizer, network=network, dtype=dtype),
        TensorDataset(*weighted_data(dtype=dtype)),
        queries=queries,
        estimator=UnrolledDifferentiation(**{"horizon": None} | settings),
        progress=False,
    )


def assert_same(found, expected, tolerance=TOLERANCE):
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def assert_forward_is_reverse(fit, root, optimizer, network=None, **arguments):
    record(fit, root, optimizer, network=network, **({"max_epochs": 3} | arguments))
    forward, reverse = (answer(root, optimizer, network, mode=mode) for mode in ("forward", "reverse"))
    assert_same(forward.responses, reverse.responses)
    torch.testing.assert_close(forward.baseline, reverse.baseline, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_forward_mode_agrees_with_reverse_mode_for_every_optimizer(fit, tmp_path, optimizer):
    assert_forward_is_reverse(fit, tmp_path, optimizer)


@pytest.mark.parametrize("gradients", ["float32", "none"])
@pytest.mark.parametrize("arguments", TRAINERS.values(), ids=TRAINERS.keys())
def test_forward_mode_follows_the_trainer(fit, tmp_path, gradients, arguments):
    assert_forward_is_reverse(fit, tmp_path, of(torch.optim.AdamW, 0.02), gradients=gradients, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("network", RANDOM_NETWORKS.values(), ids=RANDOM_NETWORKS.keys())
def test_forward_mode_replays_dropout(fit, tmp_path, network):
    assert_forward_is_reverse(fit, tmp_path, of(torch.optim.AdamW, 0.01), network=network)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "accumulated"])
@pytest.mark.parametrize("network", NORMALISED_NETWORKS.values(), ids=NORMALISED_NETWORKS.keys())
def test_forward_mode_follows_batch_norm_through_its_statistics(fit, tmp_path, network, arguments):
    optimizer = of(torch.optim.SGD, 0.05, momentum=0.9)
    assert_forward_is_reverse(fit, tmp_path, optimizer, network, max_epochs=3, **arguments)


def test_forward_mode_knows_tied_weights(fit, tmp_path):
    assert_forward_is_reverse(fit, tmp_path, of(torch.optim.AdamW), network=Tied)


def test_forward_mode_takes_stored_batches(fit, tmp_path):
    assert_forward_is_reverse(
        fit, tmp_path, sgd(momentum=0.9), batches="store", data={"dataset": Augmented}, max_epochs=3
    )


@pytest.mark.parametrize("horizon", [1, 4, 7, 40])
def test_a_horizon_leaves_out_the_same_steps_in_both_modes(fit, tmp_path, horizon):
    optimizer = of(torch.optim.AdamW, 0.02, weight_decay=0.1)
    record(fit, tmp_path, optimizer)
    forward, reverse = (answer(tmp_path, optimizer, mode=mode, horizon=horizon) for mode in ("forward", "reverse"))
    assert_same(forward.responses, reverse.responses)


@pytest.mark.parametrize("network", NORMALISED_NETWORKS.values(), ids=NORMALISED_NETWORKS.keys())
def test_statistics_of_the_steps_that_a_horizon_leaves_out_are_measured(fit, tmp_path, network):
    optimizer = of(torch.optim.SGD, 0.05, momentum=0.9)
    arguments = {"network": network}
    record(fit, tmp_path, optimizer, max_epochs=3, **arguments)
    forward, reverse = (
        answer(tmp_path, optimizer, **arguments, mode=mode, horizon=2) for mode in ("forward", "reverse")
    )
    assert_same(forward.responses, reverse.responses)
    torch.testing.assert_close(forward.baseline, reverse.baseline, rtol=1e-12, atol=1e-12)


def single_precision(root):
    for seed in range(3):
        pl.seed_everything(seed, verbose=False)
        inputs, targets, weights = weighted_data(dtype=torch.float32)
        trainer = pl.Trainer(
            max_epochs=4,
            callbacks=[TrajectoryRecorder(root)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=0.5,
        )
        module = WeightedRegressor(sgd(momentum=0.9), dtype=torch.float32)
        data = torch.utils.data.DataLoader(TensorDataset(inputs, targets, weights), batch_size=5, shuffle=True)
        trainer.fit(module, data)


@pytest.mark.slow
def test_stacked_runs_rebuilt_from_recorded_gradients_agree_up_to_single_precision(tmp_path):
    single_precision(tmp_path)
    arguments = {"dtype": torch.float32, "queries": TensorDataset(*weighted_data(4, seed=1, dtype=torch.float32))}
    reverse = answer(tmp_path, sgd(momentum=0.9), mode="reverse", **arguments)
    for size in (1, 3):
        forward = answer(tmp_path, sgd(momentum=0.9), mode="forward", runs_per_batch=size, **arguments)
        assert_same(forward.responses, reverse.responses, 1e-4)
        assert all(drift["gradients"] < 1e-4 for drift in forward.about["drift"].values())
    double = answer(tmp_path, sgd(momentum=0.9), mode="forward", precision="float64", **arguments)
    assert_same(double.responses, reverse.responses.double(), 1e-4)


@pytest.fixture
def replay(fit, tmp_path):
    """A training of 15 steps with checkpoints after 4, 8 and 12."""
    optimizer = of(torch.optim.Adam, 0.02)
    record(fit, tmp_path, optimizer, gradients="none", gradient_clip_val=0.5)
    data = training_examples(TensorDataset(*weighted_data()))
    return Replay([*Ensemble.open(tmp_path)], WeightedRegressor(optimizer), data)


def one_by_one(replay):
    return torch.eye(len(replay.examples), dtype=replay.dtype)


def question(replay):
    """How the loss of each query changes with each example."""
    examples = replay.examples
    return Question(
        replay.eager.replica.module,
        examples,
        query_examples(QUERIES, examples),
        resolve_measurement("loss")[1],
        replay.device,
        Removals(len(examples)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "network"),
    [(of(torch.optim.Adam, 0.02), None), (sgd(momentum=0.9), NORMALISED_NETWORKS["BatchNorm"])],
    ids=["Adam", "BatchNorm"],
)
def test_responses_on_the_way_are_those_of_a_training_that_was_stopped_there(fit, tmp_path, optimizer, network):
    arguments = {"network": network}
    record(fit, tmp_path / "whole", optimizer, **arguments)
    data = training_examples(TensorDataset(*weighted_data()))
    replay = Replay([*Ensemble.open(tmp_path / "whole")], WeightedRegressor(optimizer, network=network), data)
    chunks = {"removals_per_chunk": 5, "queries_per_chunk": 3}
    for step in (1, 4, 7, 15):
        record(fit, tmp_path / str(step), optimizer, max_steps=step, **arguments)
        expected = answer(tmp_path / str(step), optimizer, mode="reverse", **arguments)
        baseline, found = estimate_forward(replay, one_by_one(replay), question(replay), step=step, **chunks)
        assert_same(found, expected.responses)
        torch.testing.assert_close(baseline, expected.baseline, rtol=1e-12, atol=1e-12)


def test_running_statistics_between_checkpoints_are_rebuilt(fit, tmp_path):
    network = NORMALISED_NETWORKS["BatchNorm"]
    record(fit, tmp_path, sgd(), network=network)
    module = WeightedRegressor(sgd(), network=network)
    replay = Replay([*Ensemble.open(tmp_path)], module, training_examples(TensorDataset(*weighted_data())))
    asked = question(replay)
    chunks = {"removals_per_chunk": 12, "queries_per_chunk": 4}
    baseline, _ = estimate_forward(replay, one_by_one(replay), asked, step=6, **chunks)
    expected, _, _ = asked.measure_with_gradients(replay, range(4), step=6)
    torch.testing.assert_close(baseline, expected, rtol=1e-12, atol=1e-12)


def test_responses_of_the_parameters_are_differences_of_retraining_at_every_checkpoint(replay):
    steps = {4, 8, 12, 15}
    found = {position.step: position for position in forward_sweep(replay, one_by_one(replay), steps)}
    assert set(found) == steps
    for step, position in found.items():
        assert position.tangents.theta.shape == (1, 12, replay.layout.size)
        for example in (0, 5):
            weights = torch.ones(1, 12, dtype=torch.float64)
            moved = []
            for sign in (1, -1):
                weights[:, example] = 1 + sign * 1e-5
                moved.append(replay.retrain(weights, stop=step)[0])
            assert_same(position.tangents.theta[:, example], -(moved[0] - moved[1]) / 2e-5, 1e-6)


def test_the_response_of_a_group_is_the_sum_of_those_of_its_members(replay):
    membership = torch.zeros(2, 12, dtype=torch.float64)
    membership[0, [1, 4, 7]] = membership[1, [0]] = 1
    (groups,) = forward_sweep(replay, membership)
    (singles,) = forward_sweep(replay, one_by_one(replay))
    assert_same(groups.tangents.theta[:, 0], singles.tangents.theta[:, [1, 4, 7]].sum(1))
    assert_same(groups.tangents.theta[:, 1], singles.tangents.theta[:, 0])


def test_a_sweep_holds_no_steps(replay, monkeypatch):
    monkeypatch.setattr(Replay, "backwards", lambda *_: pytest.fail("a stretch is held"))
    (position,) = forward_sweep(replay, one_by_one(replay))
    assert position.step == 15


def test_steps_that_are_not_asked_for_are_not_taken(replay, monkeypatch):
    taken = []
    push = Replay.push
    monkeypatch.setattr(
        Replay, "push", lambda self, position, _: taken.append(position.step) or push(self, position, _)
    )
    assert [position.step for position in forward_sweep(replay, one_by_one(replay), {3, 6}, start=2)] == [3, 6]
    assert taken == [2, 3, 4, 5]


def test_the_measurement_on_the_way_is_that_of_the_rebuilt_model(replay):
    (position,) = forward_sweep(replay, one_by_one(replay), {6})
    values, gradients, _ = question(replay).measure_with_gradients(replay, range(4), step=6)
    torch.testing.assert_close(position.theta, replay.trained(6)[0])
    assert values.shape == (1, 4)
    assert gradients.shape == (1, 4, replay.layout.size)


def test_a_replay_that_leaves_the_record_is_refused(fit, tmp_path, monkeypatch):
    optimizer = sgd(momentum=0.9)
    record(fit, tmp_path, optimizer)
    monkeypatch.setattr("lightning_dtda.replay.examples.refuse_changed_data", lambda *arguments: None)
    inputs, targets, weights = weighted_data()
    data = training_examples(TensorDataset(inputs, targets + 0.1, weights))
    with pytest.raises(ReplayError, match=r"gradient of step \d+ is not the recorded one"):
        list(
            forward_sweep(
                Replay([*Ensemble.open(tmp_path)], WeightedRegressor(optimizer), data), torch.ones(1, 12).double()
            )
        )


def test_without_recorded_gradients_it_is_found_at_the_next_checkpoint(replay, monkeypatch):
    advance = Replay.advance
    monkeypatch.setattr(Replay, "advance", lambda *arguments: (advance(*arguments)[0] + 1e-2, advance(*arguments)[1]))
    with pytest.raises(ReplayError, match="not reproduced between step 0 and step 4"):
        list(forward_sweep(replay, one_by_one(replay)))


def test_chunks_of_removals_and_queries_change_nothing_but_rounding(fit, tmp_path, monkeypatch, take_100_mib):
    optimizer = sgd(momentum=0.9)
    record(fit, tmp_path, optimizer)
    whole = answer(tmp_path, optimizer, mode="forward").responses
    take_100_mib("forward_costs")
    plans = []
    original = UnrolledDifferentiation.plan
    monkeypatch.setattr(UnrolledDifferentiation, "plan", lambda *a: plans.append(original(*a)) or plans[-1])
    chunked = answer(tmp_path, optimizer, mode="forward", memory_budget=0.25).responses
    assert (plans[0].removals_per_chunk, plans[0].queries_per_chunk) == (2, 1)
    assert_same(chunked, whole)


@pytest.mark.parametrize(("queries", "chosen"), [(4, "reverse"), (13, "forward")])
def test_auto_pays_for_the_fewer_and_says_so(fit, tmp_path, caplog, queries, chosen):
    optimizer = sgd(momentum=0.9)
    record(fit, tmp_path, optimizer, max_epochs=2)
    with caplog.at_level(logging.INFO, logger="lightning_dtda"):
        found = answer(tmp_path, optimizer, queries=TensorDataset(*weighted_data(queries, seed=1)))
    counts = {
        "reverse": f"{queries} queries, not with the 12 removals",
        "forward": f"12 removals, not with the {queries} queries",
    }
    assert f"{chosen.capitalize()} mode: the cost grows with the {counts[chosen]}." in caplog.messages
    assert bool(found.about["adjoint_norms"]["seed-0003"]) == (chosen == "reverse")


def test_what_does_not_fit_the_memory_is_refused_before_it_starts(fit, tmp_path):
    record(fit, tmp_path, sgd(), max_epochs=1)
    with pytest.raises(AttributionError, match="One removal of one run needs about"):
        answer(tmp_path, sgd(), mode="forward", memory_budget=1e-7)


def test_the_members_of_many_removals_count_as_memory(replay):
    few, many = (forward_costs(replay, 1, removals).per_run for removals in (10, 100_010))
    assert many - few > 100_000 * len(replay.examples) * replay.dtype.itemsize


def test_arguments_that_do_not_go_together_are_refused():
    with pytest.raises(AttributionError, match="forward"):
        UnrolledDifferentiation(mode="sideways")
    with pytest.raises(AttributionError, match='mode="reverse"'):
        UnrolledDifferentiation(mode="forward", horizon="auto")
