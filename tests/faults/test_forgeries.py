"""Forged files with right checksums, and other things in place of files: an error of ours or an answer."""

import contextlib
import shutil
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import callbacks
from safetensors.torch import load

from lightning_dtda import Attribution, Ensemble, GroundTruth
from lightning_dtda.attribution import Gallery, Shown
from lightning_dtda.attribution.attribution_store import AttributionStore
from lightning_dtda.attribution.gallery.pictures import png
from lightning_dtda.attribution.kept_store import KeptStore
from lightning_dtda.errors import DTDAError
from lightning_dtda.estimators import ExactRemoval
from lightning_dtda.replay.records import Records
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.truth_store import TruthStore
from lightning_dtda.trajectory.storage import read_json, write_json, write_tensors
from tests.faults import recorded
from tests.faults.asking import everything
from tests.faults.forgeries import IN_PLACE, bounded, forge, put_in_place
from tests.trajectory.runs import write_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes, and limits of memory")

RUNS, QUERIES, REMOVALS = 8, 3, 30


def an_attribution(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"seed-{seed:04d}" for seed in range(RUNS))
    groups = [{"name": f"g{k}", "examples": [2 * k, 2 * k + 1]} for k in range(REMOVALS)]
    about = {
        "measurement": "loss",
        "removals": groups,
        "step": 7,
        "drift": {name: {"parameters": 0.0, "gradients": None} for name in names},
        "adjoint_norms": {name: {"0": 1.0, "7": 1.0} for name in names},
        "diagnosis": {name: {"finite_differences": 1e-3, "precision": 1e-6} for name in names},
        "response_norm": dict.fromkeys(names, 1.0),
        "largest_response": dict.fromkeys(names, 2.0),
        "shared": {"training": "none", "evaluation": "none", "reduction": "mean"},
        "draws": {"number": 3, "seed": 0},
        "estimator": {"class": "x.Y"},
        "configuration": {"dataset": {"length": 60, "fingerprint": None}},
    }
    baseline = torch.randn(RUNS, QUERIES, generator=generator, dtype=dtype)
    responses = torch.randn(RUNS, QUERIES, REMOVALS, generator=generator, dtype=dtype)
    image = Shown(label="1", image=png(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    row = Shown("a name", "2", text="a text", fields=(("x1", "0.5"), ("x2", "3")), prediction="7 in 3 of 8 runs")
    gallery = Gallery({0: image, 17: row}, {4: image, 15: row})
    return Attribution(baseline, responses, names, (4, 8, 15), about, gallery)


def a_truth():
    generator = torch.Generator().manual_seed(1)
    measurements = torch.randn(3, 4, QUERIES, generator=generator)
    about = {"removal": "drop", "measurement": "loss", "data": {"length": 60}, "engine": "trainer", "versions": {}}
    baseline = torch.randn(5, QUERIES, generator=generator)
    return GroundTruth(measurements, baseline, ((0, 1), (2,), ()), (4, 8, 15), tuple(range(4)), tuple(range(5)), about)


def ask_run(root):
    found = everything(root)
    [run] = Ensemble.open(root)
    records = Records((run,), torch.float64, torch.device("cpu"))
    for step in run.checkpoint_steps:
        records.checkpoint(step)
        records.buffers(step)
    return found, run.checksum, run.average(), run.averaged_steps, run.clipping, run.learning_rates(0), repr(run)


def ask_attribution(path):
    attribution = Attribution.load(path)
    found = [attribution.influence(each) for each in ("mean", "variance")]
    found += [attribution.standard_error("mean"), attribution.p_values("variance"), attribution.reliability("mean")]
    attribution.top(2)
    attribution.to_xarray()
    attribution.select([0])
    kind = KeptStore if "keep_top" in attribution.about else AttributionStore
    about = an_attribution().about | ({"keep_top": 2} if kind is KeptStore else {})
    kind.create(path, about, (4, 8, 15), REMOVALS, dict.fromkeys(attribution.runs))
    shown = [*attribution.gallery.examples.values(), *attribution.gallery.queries.values()]
    assert all(isinstance(value, str) for each in shown for field in each.fields for value in field)
    return found, shown, repr(attribution), attribution.chaotic, attribution.ill_conditioned, attribution.members


def ask_truth(path):
    truth = GroundTruth.load(path)
    truth.to_xarray()
    store = TruthStore.create(path, a_truth().about, (4, 8, 15), ((2,), (7,)), (0, 9), (0,))
    store.note("stacked", {Task(0, 1): "reason"})
    return truth.finished().influence("mean"), repr(truth), truth.unfinished, truth.removal


def ask_recorded(root):
    for run in Ensemble.open(root):
        for step in range(run.steps):
            run.theta_vector(step)
            run.micro_batches(step)
    recorded.ask(root)


KINDS = {
    "run": ("run/manifest.json", None, ask_run),
    "process": ("run/process-1/manifest.json", None, ask_run),
    "attribution": ("attribution.json", "responses", ask_attribution),
    "kept": ("attribution.json", "figures", ask_attribution),
    "gallery": ("gallery.json", None, ask_attribution),
    "truth": ("truth.json", None, ask_truth),
}
RECORDED = {
    "indices": ("seed-0001/manifest.json", None, ask_recorded),
    "store": ("seed-0001/manifest.json", None, ask_recorded),
    "average": ("seed-0001/manifest.json", None, ask_recorded),
}
"""Whole recordings; to attribute one takes a second."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    write_run(root / "run" / "run")
    write_run(root / "process" / "run")
    shutil.copytree(root / "process" / "run", root / "process" / "run" / "process-1")
    manifest = root / "process" / "run" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"processes": 2})
    an_attribution().save(root / "attribution")
    an_attribution().save(root / "gallery")
    an_attribution().keep_top(2).save(root / "kept")
    a_truth().save(root / "truth")
    for kind, (_, _, ask) in KINDS.items():
        ask(root / kind)
    return root


def assert_harmless(ask, path):
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(DTDAError):
            ask(path)


def forged(sound, tmp_path, data, kind):
    index, table, ask = (KINDS | RECORDED)[kind]
    path = tmp_path / kind
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound / kind, path)
    file = path / index
    forge(data.draw, file.parent, file.name, table)
    assert_harmless(ask, path)


QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
LONG = settings(QUICK, max_examples=500, print_blob=True)


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(data=st.data())
def test_a_forged_file_is_an_error_of_ours_or_an_answer(sound, tmp_path, kind, data):
    forged(sound, tmp_path, data, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@LONG
@given(data=st.data())
def test_many_forged_files_are_errors_of_ours_or_answers(sound, tmp_path, kind, data):
    forged(sound, tmp_path, data, kind)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    recorded.record(root / "indices")
    recorded.record(root / "store", batches="store")
    recorded.record(root / "average", averaged=True)
    recorded.record(root / "bfloat16", gradients="bfloat16")
    recorded.record(root / "none", gradients="none")
    return root


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="lightning has no average of BatchNorm")
@pytest.mark.parametrize(
    ("kind", "key"),
    [("indices", "checkpoints"), ("bfloat16", "checkpoints"), ("none", "checkpoints"), ("average", "average")],
)
def test_other_final_parameters_with_right_checksums_answer_no_question(recordings, tmp_path, kind, key):
    shutil.copytree(recordings / kind, tmp_path / kind)
    run = tmp_path / kind / "seed-0000"
    content = read_json(run / "manifest.json")
    entry = content[key][-1] if key == "checkpoints" else content[key]
    tensors = load((run / entry["file"]).read_bytes())
    scaled = {name: 1.5 * tensor if name.startswith("parameters.") else tensor for name, tensor in tensors.items()}
    entry |= write_tensors(run / entry["file"], scaled)
    write_json(run / "manifest.json", content)
    for estimator in (*recorded.ESTIMATORS, ExactRemoval()):
        with pytest.raises(DTDAError, match=r"seed-0000.* is not (reproduced|the average)"):
            recorded.ask(tmp_path / kind, [estimator])


def test_stored_batches_of_another_type_are_refused(recordings, tmp_path):
    shutil.copytree(recordings / "store", tmp_path / "store")
    run = tmp_path / "store" / "seed-0000"
    content = read_json(run / "manifest.json")
    for entry in content["shards"]:
        tensors = load((run / entry["file"]).read_bytes())
        entry |= write_tensors(run / entry["file"], tensors | {"leaves.0": tensors["leaves.0"].double()})
    write_json(run / "manifest.json", content)
    for estimator in recorded.ESTIMATORS:
        with pytest.raises(DTDAError, match=r"stored batches is \['torch.float64 \(2,\)', .* Give the data that"):
            recorded.ask(tmp_path / "store", [estimator])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="lightning has no average of BatchNorm")
@pytest.mark.parametrize("kind", RECORDED)
@settings(LONG, max_examples=30)
@given(data=st.data())
def test_what_a_forged_recording_answers_when_attributed(recordings, tmp_path, kind, data):
    forged(recordings, tmp_path, data, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", IN_PLACE)
def test_what_is_no_file_is_refused(sound, tmp_path, kind, what):
    ask = KINDS[kind][2]
    for number, file in enumerate(sorted(path for path in (sound / kind).rglob("*") if path.is_file())):
        copied = tmp_path / str(number)
        shutil.copytree(sound / kind, copied)
        put_in_place(copied / file.relative_to(sound / kind), what)
        if file.name.startswith("."):  # a lock, which holds nothing
            assert_harmless(ask, copied)
            continue
        with bounded(), pytest.raises(DTDAError):
            ask(copied)
