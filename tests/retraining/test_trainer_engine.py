"""Trainings by the user's Trainer: what they measure, what fails, what is gone on with."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_dtda import GroundTruth, TrajectoryRecorder, retrain
from lightning_dtda.errors import ExecutionError, RetrainingError
from lightning_dtda.execution import fitting
from lightning_dtda.retraining import Task
from lightning_dtda.retraining.fresh_seeds import FIRST_SEED
from lightning_dtda.trajectory import Ensemble
from tests.retraining.tasks import (
    BATCH,
    TRAINER,
    Data,
    Regressor,
    by_hand,
    examples,
    make_trainer,
    queries,
    training_loader,
)

SUBSETS = [[2, 11], [5]]


def retrained(module=Regressor, data=None, **arguments):
    data = training_loader() if data is None else data
    defaults = {"subsets": SUBSETS, "seeds": [3, 4], "queries": queries(), "stacked": False, "trainer": make_trainer}
    return retrain(module, data, **(defaults | arguments), progress=False)


def test_dropping_is_training_on_a_data_set_that_never_had_the_examples():
    truth = retrained(baseline_seeds=[8])
    assert truth.measurements.shape == (2, 2, 3)
    # the same numbers in the same order: only the order of a sum may differ
    for k, removed in enumerate(SUBSETS):
        for s, seed in enumerate((3, 4)):
            torch.testing.assert_close(truth.measurements[k, s], by_hand(seed, removed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth.baseline[0], by_hand(8), rtol=1e-12, atol=1e-12)
    assert truth.about["removal"] == "drop"
    assert truth.about["engine"] == "trainer"


def test_a_training_on_everything_is_the_recorded_run(tmp_path):
    for seed in (3, 4):
        pl.seed_everything(seed, verbose=False)
        module = Regressor()
        make_trainer(callbacks=[TrajectoryRecorder(tmp_path)]).fit(module, training_loader())
    ensemble = Ensemble.open(tmp_path)
    with pytest.warns(UserWarning, match=r"seeds has 2 seeds that were recorded \(3 ...\).*shares noise"):
        truth = retrained(ensemble=ensemble)
    inputs, targets = queries().tensors
    for s, run in enumerate(ensemble):
        module.load_state_dict(run.theta(run.steps), strict=False)
        with torch.no_grad():
            expected = (module.net(inputs)[:, 0] - targets) ** 2
        assert torch.equal(truth.baseline[s], expected)
    with pytest.raises(RetrainingError, match="training data are not those of"):
        retrained(data=DataLoader(queries(), 2), ensemble=ensemble, subsets=[[0]])


def test_large_models_of_earlier_trainings_are_not_left_in_memory(monkeypatch):
    made, alive = weakref.WeakSet(), []

    class Watched(Regressor):
        def __init__(self):
            super().__init__()
            made.add(self)

    def trainer():
        alive.append(len(made))
        return make_trainer()

    monkeypatch.setattr(fitting, "_LARGE", 0)
    gc.disable()  # Python collects some of them now and then, by luck
    try:
        retrained(Watched, seeds=[3, 4, 5, 6], trainer=trainer)
    finally:
        gc.enable()
    # the one of this training, the one before, and the one whose configuration was described before all
    assert max(alive[-11:]) <= 3


def test_fresh_seeds_are_none_of_the_recorded_ones():
    truth = retrained(seeds=2, baseline_seeds=3, subsets=[[0]])
    assert truth.seeds == (FIRST_SEED, FIRST_SEED + 1)
    assert truth.baseline_seeds == (FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2)


@pytest.mark.slow
def test_workers_train_what_would_be_stacked_without_them():
    arguments = {"subsets": [[0], [1], [2]], "seeds": [3, 4, 5], "baseline_seeds": [3, 4, 5]}
    truth = retrained(workers=2, **arguments)
    assert truth.about["engine"] == "trainer"
    torch.testing.assert_close(truth.measurements, retrained(**arguments).measurements, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_parallel_processes_measure_the_same():
    # functions that plain pickle refuses
    rate = 0.1
    truth = retrained(lambda: Regressor(rate), trainer=lambda: make_trainer(), workers=2)
    torch.testing.assert_close(truth.measurements, retrained().measurements, rtol=1e-12, atol=1e-12)


def test_a_module_is_made_again_from_its_hyperparameters():
    made = retrained(Regressor(rate=0.05))
    assert torch.equal(made.measurements, retrained(lambda: Regressor(0.05)).measurements)
    assert made.about["module"]["hyperparameters"] == {"rate": 0.05}


def test_a_module_that_cannot_be_made_again_is_refused():
    class Wide(pl.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.net = torch.nn.Linear(3, width)

    class Needy(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

    with pytest.raises(RetrainingError, match=r"differs from this one.*save_hyperparameters.*pass a function"):
        retrained(Wide(5))
    with pytest.raises(RetrainingError, match=r"Needy\(net\) cannot be created again.*module=lambda: Needy"):
        retrained(Needy(torch.nn.Linear(3, 1)))


def test_a_data_module_is_set_up_by_the_trainer_and_its_loader_thinned():
    data = Data()
    truth = retrained(data=data, seeds=[3], subsets=[[0]])
    data.setup("fit")
    kept = TensorDataset(*(tensor[1:] for tensor in data.train.tensors))
    plain = retrained(data=DataLoader(kept, BATCH, shuffle=True), seeds=[9], baseline_seeds=[3], subsets=[[1]])
    assert torch.equal(truth.measurements[0, 0], plain.baseline[0])
    assert "train_dataloader" not in data.__dict__


def test_data_that_depend_on_the_seed_are_refused():
    wanted = r"training data with seed \d differ from those at the start.*separate generator"
    with pytest.raises(RetrainingError, match=wanted):
        retrained(data=Data(split_seed=None))


def test_data_that_are_augmented_at_random_can_be_trained_on_again():
    class Jittered(TensorDataset):
        def __getitem__(self, index):
            inputs, targets = super().__getitem__(index)
            return inputs + 0.1 * torch.randn_like(inputs), targets

    class Augmented(Data):
        def setup(self, stage=None):
            super().setup(stage)
            self.train = Jittered(*self.train.tensors)

    truth = retrained(data=Augmented())
    assert truth.about["data"]["fingerprint"] is None
    assert torch.equal(truth.measurements, retrained(data=Augmented()).measurements)
    assert not torch.equal(truth.baseline, retrained(data=Data()).baseline)


def test_a_generator_of_the_loader_starts_alike_for_every_training():
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    data = training_loader(generator=generator)
    first = retrained(data=data)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(retrained(data=data).measurements, first.measurements)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subsets": []}, "There are no subsets"),
        ({"subsets": [[]]}, "Subset 0 is empty"),
        ({"subsets": [range(13)]}, "removes all 13"),
        ({"subsets": [[1], [13]]}, r"Subset 1: There is no training example 13; indices are 0 to 12"),
        ({"subsets": [[1, 1]]}, "Subset 0: Training example 1 is given twice"),
        ({"subsets": [[1, 2], [2, 1]]}, "Subsets 0 and 1 are the same"),
        ({"seeds": []}, "must give at least one seed"),
        ({"seeds": 0}, "must give at least one seed"),
        ({"seeds": [1, 1]}, "must give at least one seed"),
        ({"seeds": [0.5]}, "must be a number of seeds"),
        ({"removal": "forget"}, "choose from drop, reweight"),
        ({"removal": "reweight", "stacked": "auto"}, "Pass ensemble="),
        ({"removal": "reweight"}, "in this process, stacked if possible. Leave out workers, stacked and compile"),
        ({"trainer": pl.Trainer(**TRAINER)}, "A Trainer can fit only once"),
        ({"trainer": None}, "A Trainer can fit only once"),
        ({"data": examples()}, r"data is a TensorDataset.*DataLoader\(dataset, batch_size=32"),
        ({"module": "Regressor"}, "must be a LightningModule, or a function"),
        ({"module": lambda: 3}, "Let it return a LightningModule"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_way_out(arguments, message):
    with pytest.raises(RetrainingError, match=message):
        retrained(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, r"workers=0; give a number of processes.*RayCluster"),
        ({"stacked": "warp"}, "stacked='warp'; choose True, False or \"auto\""),
        ({"stacked": True, "workers": 2}, "Leave out workers or stacked"),
        ({"stacked": 1}, 'choose True, False or "auto"'),
        ({"stacked": False, "compile": True}, "compile=True is for stacked trainings"),
        ({"workers": 2, "compile": False}, "Set stacked=True without workers, or leave out compile"),
        ({"stacked": True, "device": "abacus"}, "no device 'abacus'"),
    ],
)
def test_where_and_how_that_make_no_sense_are_refused_with_the_way_out(arguments, message):
    with pytest.raises(ExecutionError, match=message):
        retrained(**arguments)


def test_a_sampler_that_cannot_be_thinned_is_refused():
    loader = DataLoader(examples(), BATCH, sampler=WeightedRandomSampler(torch.ones(13), 13))
    with pytest.raises(RetrainingError, match=r"sampler WeightedRandomSampler.*removal=\"reweight\""):
        retrained(data=loader)


def test_a_trainer_that_is_used_twice_is_refused():
    trainer = make_trainer()
    with pytest.raises(RetrainingError, match="returns the same Trainer each time"):
        retrained(trainer=lambda: trainer)


class Failing(Regressor):
    """Fails for a seed, diverges for another."""

    def on_train_start(self):
        seed = int(os.environ["PL_GLOBAL_SEED"])
        if seed == 4:
            raise ValueError("no luck today")
        if seed == 5:
            self.net[0].weight.data.fill_(torch.nan)


def test_trainings_that_fail_are_named_and_the_others_go_on(tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"4 of 6 trainings failed \(all data seed 4, subset 0 seed 4: ValueError: no luck today; all data",
    ):
        truth = retrained(Failing, seeds=[3, 4, 5], subsets=[[2, 11]], output=tmp_path)
    assert truth.unfinished == (Task(None, 4), Task(None, 5), Task(0, 4), Task(0, 5))
    torch.testing.assert_close(truth.measurements[0, 0], by_hand(3, [2, 11]))
    reasons = {(entry["subset"], entry["seed"]): entry["reason"] for entry in truth.about["failures"]}
    assert "diverged" in reasons[0, 5]
    with pytest.warns(UserWarning, match="unfinished: 4 trainings are missing"):
        assert len(GroundTruth.load(tmp_path).about["failures"]) == 4
    with pytest.raises(RetrainingError, match="nothing to measure"):
        retrained(Failing, seeds=[4], subsets=[[1]])


def test_a_second_call_trains_only_what_is_missing(tmp_path, monkeypatch):
    first = retrained(output=tmp_path)
    fitted = []
    original = pl.Trainer.fit
    monkeypatch.setattr(pl.Trainer, "fit", lambda *args, **kwargs: (fitted.append(1), original(*args, **kwargs))[1])
    again = retrained(output=tmp_path)
    assert torch.equal(again.measurements, first.measurements)
    assert not fitted
    more = retrained(output=tmp_path, subsets=[[7], [5]], seeds=[4, 6], baseline_seeds=[3])
    # subset [5] with seed 4 and everything with seed 3 are there
    assert len(fitted) == 3
    assert torch.equal(more.measurements[1, 0], first.measurements[1, 1])
    torch.testing.assert_close(more.measurements[0, 1], by_hand(6, [7]), rtol=1e-12, atol=1e-12)
    with pytest.raises(RetrainingError, match=r"another question \(different module"):
        retrained(lambda: Regressor(0.3), output=tmp_path)


class Killed(Regressor):
    """Kills its process for a seed, unless the training is done over again."""

    def on_train_start(self):
        if os.environ["PL_GLOBAL_SEED"] == "4" and "RETRAINED" not in os.environ:
            time.sleep(1)  # the others are done by then
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_reported_and_what_was_finished_is_kept(tmp_path, monkeypatch):
    arguments = {"module": Killed, "seeds": [3, 4], "subsets": [[1]], "output": tmp_path}
    with pytest.raises(ExecutionError, match=r"A process was killed.*\d tasks were finished.*call again"):
        retrained(workers=2, **arguments)
    done = len(list(tmp_path.glob("trainings-*")))
    assert done >= 1
    monkeypatch.setenv("RETRAINED", "1")
    truth = retrained(**arguments)
    assert not truth.unfinished
    torch.testing.assert_close(truth.measurements[0, 1], by_hand(4, [1]), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_killed_retraining_loses_only_the_training_under_way(tmp_path):
    script = textwrap.dedent(
        f"""
        import time
        from lightning_dtda import retrain
        from tests.retraining.tasks import *

        Regressor.on_train_start = lambda module: time.sleep(0.5)
        retrain(Regressor, training_loader(), subsets=[[2, 11], [5]], seeds=[3, 4], queries=queries(), stacked=False,
                trainer=make_trainer, output={str(tmp_path)!r}, progress=False)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("trainings-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.glob("trainings-*")))
    assert 3 <= done < 6
    with pytest.warns(UserWarning, match=f"{6 - done} trainings are missing"):
        GroundTruth.load(tmp_path)
    truth = retrained(output=tmp_path)
    assert len(list(tmp_path.glob("trainings-*"))) == 6
    torch.testing.assert_close(truth.measurements, retrained().measurements, rtol=1e-12, atol=1e-12)
