"""``attribute``: from recorded runs to an attribution."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.attribution_store import AttributionStore, with_runs
from lightning_dtda.attribution.keeping import attribute_in_blocks
from lightning_dtda.attribution.kept import check_keep_top
from lightning_dtda.attribution.kept_store import KeptStore
from lightning_dtda.attribution.resources import check_resources
from lightning_dtda.attribution.run_batches import estimates
from lightning_dtda.attribution.trust import sizes
from lightning_dtda.compatibility import kinds
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import (
    Estimate,
    Estimator,
    InfluenceFunctions,
    Plan,
    Question,
    UnrolledDifferentiation,
    resolve_removals,
)
from lightning_dtda.estimators.curvatures.curvature import Damping, check_damping
from lightning_dtda.estimators.estimator import Advance
from lightning_dtda.estimators.removals import LEAVE_ONE_OUT
from lightning_dtda.execution import Workers, workers_of
from lightning_dtda.execution.device import usable_device
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.replay import (
    Draws,
    Measurement,
    dataset_fingerprint,
    query_examples,
    query_names,
    resolve_measurement,
    training_examples,
)
from lightning_dtda.replay.measuring import is_random
from lightning_dtda.trajectory import Ensemble, Run
from lightning_dtda.version import __version__

_log = logging.getLogger(__name__)


def attribute(
    ensemble: Ensemble,
    module: LightningModule,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any],
    *,
    queries: DataLoader[Any] | Dataset[Any],
    measurement: str | Measurement = "loss",
    estimator: Estimator | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    removals: Any = LEAVE_ONE_OUT,
    step: int | None = None,
    measurement_draws: int = Draws.number,
    measurement_seed: int = Draws.seed,
    keep_top: int | None = None,
    scratch_budget: float = 2.0,
    device: torch.device | str | None = None,
    workers: int | Workers = 1,
    progress: bool = True,
) -> Attribution:
    r"""Predict how each query's measurement changes, in every run, when training examples are removed.

    .. math:: r_{s,q,k} \approx m_q(\theta_t^{(s)} \text{ with } w_n = 0 \text{ for } n \in S_k) - m_q(\theta_t^{(s)})

    Removing an example means giving it weight zero: batch order, batch size and the loss's denominator stay the same
    (arXiv 2506.12965, section 2).

    Args:
        ensemble: The S recorded runs.
        module: The LightningModule that was trained, unchanged; only its architecture is used, not its weights.
        data: The training data, N examples: a data module, a DataLoader, the training Dataset, or a module with its own
            ``train_dataloader``.
        queries: The Q inputs on which the measurement is taken. The indices of a ``Subset`` become their names.
        measurement: ``"loss"``, ``"margin"``, ``"prediction"``, or a callable ``(module, batch) -> (B,)``.
        estimator: Method that computes the responses. Defaults to exact unrolled differentiation.
        output: Directory for the result. Each batch of runs is stored there as soon as it is finished; after a crash,
            the same call continues where it stopped.
        overwrite: Whether to replace an attribution with other settings in ``output``.
        removals: What is removed: ``"leave-one-out"``, every example on its own; or groups of examples that are removed
            together, given as a list of groups, each a list of the indices of its examples; a mapping from names to
            such lists; a label for each example, one group for each label; or ``"column:KEY"``, where KEY is the
            position or the key of the labels in the data set's items.
        step: The step t after which m is measured; ``None`` means the end of each run, t = T.
        measurement_draws: Number of draws to average over if the measurement draws random numbers (such as the
            denoising loss of a diffusion model). All runs use the same draws.
        measurement_seed: Seed of these draws.
        keep_top: Number of removals at each end whose responses are kept for each query, with summary figures of all
            removals; see :meth:`Attribution.keep_top <lightning_dtda.Attribution.keep_top>`. Use it if there are more
            responses than can be stored. Queries are processed in blocks; a crash loses no finished run of a block.
        scratch_budget: Scratch space in GiB for a block of queries with ``keep_top``: on disk if there is an output,
            otherwise in memory. Anything an estimator computes once for all queries, such as a curvature, is computed
            again for each block.
        device: Device to compute on; ``None`` means the module's device.
        workers: Number of processes on this machine that share the runs, each of which needs the estimator's memory; or
            a :class:`~lightning_dtda.execution.RayCluster`, whose nodes read the runs from a shared disk. The results
            are the same, up to rounding if batches have to be split to keep all workers busy.
        progress: Whether to show a progress bar and the plan.

    Returns:
        The attribution, with baseline ``(S, Q)`` and responses ``(S, Q, K)`` to K removals; K = N for leave-one-out.

    Raises:
        AttributionError: If an argument is invalid, or there is not enough memory or disk space.
        ReplayError: If module or data differ from those of the recorded training.
        ExecutionError: If the device does not exist, or a worker fails.
    """
    if keep_top is not None:
        check_keep_top(keep_top)
        if not scratch_budget > 0:
            raise AttributionError(f"scratch_budget={scratch_budget}; give a positive number of GiB.")
    estimator, workers = UnrolledDifferentiation() if estimator is None else estimator, workers_of(workers)
    draws = Draws(measurement_draws, measurement_seed)
    question, about, names = _ask(
        ensemble, module, data, queries, measurement, estimator, removals, step, device, draws
    )
    path = None if output is None else Path(output)
    if path is not None and "<" in (name := about["measurement"]):
        raise AttributionError(
            f"The measurement {name} has no unique name, so its stored results could be confused with those of "
            "another. Define it as a function at the top level of a Python module, or give no output."
        )
    asked = len(question.removals), {run.name: run.checksum for run in sorted(ensemble, key=lambda run: run.name)}

    def answered(numbers: range, into: Path | None) -> Attribution:
        part = question if len(numbers) == len(names) else replace(question, queries=question.queries.stretch(numbers))
        called = names[numbers.start : numbers.stop]
        if into is None:
            return _assembled(_estimates(list(ensemble), part, estimator, workers, progress), about, called)
        store = AttributionStore.create(into, about, called, *asked, overwrite)
        return _answer_to_disk(ensemble, part, estimator, workers, store, progress)

    if keep_top is None:
        answer = answered(range(len(names)), path)
    else:
        told = about | {"keep_top": keep_top}
        kept = None if path is None else KeptStore.create(path, told, names, *asked, overwrite)
        answer = attribute_in_blocks(ensemble, question, estimator, keep_top, scratch_budget, kept, answered)
    drift = answer.about["drift"]
    _log.info("Largest relative drift of the replayed parameters: %.2g", max(d["parameters"] for d in drift.values()))
    if answer.chaotic:
        _log.warning(
            '%d of %d runs are chaotic and left out of influences (runs="all" includes them): %s',
            len(answer.chaotic),
            len(answer.runs),
            ", ".join(answer.chaotic),
        )
    if answer.ill_conditioned:
        _log.warning(
            "%d of %d runs are ill-conditioned: on a sample of steps, responses in single and double precision "
            'differ by more than 5 %%. Use UnrolledDifferentiation(precision="float64"). The runs: %s.',
            len(answer.ill_conditioned),
            len(answer.runs),
            ", ".join(answer.ill_conditioned),
        )
    return answer


def attribute_dampings(
    ensemble: Ensemble,
    module: LightningModule,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any],
    *,
    queries: DataLoader[Any] | Dataset[Any],
    dampings: Sequence[Damping],
    estimator: InfluenceFunctions | None = None,
    measurement: str | Measurement = "loss",
    removals: Any = LEAVE_ONE_OUT,
    step: int | None = None,
    measurement_draws: int = Draws.number,
    measurement_seed: int = Draws.seed,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[Damping, Attribution]:
    """Attribute with influence functions for several dampings, fitting the curvature only once.

    Args:
        ensemble: As for :func:`attribute`.
        module: As for :func:`attribute`.
        data: As for :func:`attribute`.
        queries: As for :func:`attribute`.
        dampings: Dampings that replace the curvature's own: numbers, or ``"auto"``.
        estimator: Influence functions, with default settings if not given.
        measurement: As for :func:`attribute`.
        removals: As for :func:`attribute`.
        step: As for :func:`attribute`.
        measurement_draws: As for :func:`attribute`.
        measurement_seed: As for :func:`attribute`.
        device: As for :func:`attribute`.
        progress: As for :func:`attribute`.

    Returns:
        An attribution for each damping; :meth:`Attribution.save` stores one.

    Raises:
        AttributionError: As for :func:`attribute`; or if there are no dampings, or one is given twice.
        ReplayError: As for :func:`attribute`.
    """
    estimator = InfluenceFunctions() if estimator is None else estimator
    if not isinstance(estimator, InfluenceFunctions):
        raise AttributionError(f"{type(estimator).__name__} has no damping. Use InfluenceFunctions(...).")
    if not dampings or len(set(dampings)) != len(dampings):
        raise AttributionError(f"dampings={dampings!r}; give at least one damping, each only once.")
    for damping in dampings:
        check_damping(damping)
    draws = Draws(measurement_draws, measurement_seed)
    question, about, names = _ask(
        ensemble, module, data, queries, measurement, estimator, removals, step, device, draws
    )
    found: list[list[tuple[tuple[Run, ...], Estimate]]] = [[] for _ in dampings]
    with _planned(list(ensemble), question, estimator, progress, answers=len(dampings)) as (plan, advance):
        for batch in plan.batches:
            estimates = estimator.estimate_dampings(batch, question, plan, advance, dampings)
            for of_damping, estimate in zip(found, estimates, strict=True):
                of_damping.append((batch, estimate))
    attributions = {}
    for damping, of_damping in zip(dampings, found, strict=True):
        settings = estimator.settings()
        settings["curvature"] = settings["curvature"] | {"damping": damping}
        attributions[damping] = _assembled(of_damping, about | {"estimator": settings}, names)
    return attributions


def _ask(
    ensemble: Ensemble,
    module: LightningModule,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any],
    queries: DataLoader[Any] | Dataset[Any],
    measurement: str | Measurement,
    estimator: Estimator,
    removals: Any,
    step: int | None,
    device: torch.device | str | None,
    draws: Draws,
) -> tuple[Question, dict[str, Any], tuple[int, ...]]:
    """Return the question, its part of ``Attribution.about``, and the names of the queries."""
    for value, kind, example in (
        (ensemble, (Ensemble,), 'Ensemble.open("runs/mine")'),
        (module, kinds("LightningModule"), "MyModule()"),
        (estimator, (Estimator,), "UnrolledDifferentiation()"),
    ):
        if not isinstance(value, kind):
            raise AttributionError(f"{value!r} is not an instance of {kind[0].__name__}. Give one, such as {example}.")
    name, function = resolve_measurement(measurement)
    examples = training_examples(data)
    examples.refuse_changes(ensemble[0])  # before anything is computed or sent to other processes
    question = Question(
        module=module,
        examples=examples,
        queries=query_examples(queries, examples),
        measurement=function,
        device=usable_device(module.device if device is None else device),
        removals=resolve_removals(removals, examples),
        step=_usable_step(step, ensemble),
        draws=draws,
    )
    replay = question.replay([ensemble[0]])
    draws_numbers = is_random(replay.eager, question.queries, function, replay.time(replay.steps))
    about = {
        "measurement": name,
        "draws": asdict(draws) if draws_numbers else None,
        "shared": ensemble[0].manifest.shared,
        "estimator": estimator.settings(),
        "removal": "reweight",
        "removals": question.removals.content(),
        "step": question.step,
        "ensemble": ensemble.root.name,
        "configuration": ensemble[0].manifest.configuration,
        "queries_fingerprint": dataset_fingerprint(question.queries.dataset),
        "version": __version__,
    }
    return question, about, query_names(question.queries)


def _answer_to_disk(
    ensemble: Ensemble,
    question: Question,
    estimator: Estimator,
    workers: Workers,
    store: AttributionStore,
    progress: bool,
) -> Attribution:
    finished = set(store.finished)
    if remaining := [run for run in ensemble if run.name not in finished]:
        if finished:
            _log.info("%d of %d runs are already attributed in %s.", len(finished), len(ensemble), store.path)
        for answer in _run_by_run(_estimates(remaining, question, estimator, workers, progress, store.path)):
            store.add(*answer)
    return Attribution.load(store.path)


def _assembled(
    estimates: Iterable[tuple[tuple[Run, ...], Estimate]], about: dict[str, Any], names: tuple[int, ...]
) -> Attribution:
    """Combine the results of batches of runs."""
    answers = sorted(_run_by_run(estimates), key=lambda answer: answer[0])
    runs, baselines, responses, facts = zip(*answers, strict=True)
    about = with_runs(about, dict(zip(runs, facts, strict=True)))
    return Attribution(torch.stack(baselines), torch.stack(responses), runs, names, about)


def _run_by_run(
    estimates: Iterable[tuple[tuple[Run, ...], Estimate]],
) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    """Yield each run's name, baseline ``(queries,)``, responses ``(queries, removals)`` and facts."""
    for batch, estimate in estimates:
        for number, run in enumerate(batch):
            norms = estimate.adjoint_norms[number] if estimate.adjoint_norms else {}
            diagnosis = asdict(estimate.diagnoses[number]) if estimate.diagnoses else {}
            known = {"drift": asdict(estimate.drift[number]), "adjoint_norms": norms, "diagnosis": diagnosis}
            baseline, responses = estimate.baseline[number], estimate.responses[number]
            yield run.name, baseline.cpu(), responses.cpu(), known | sizes(responses)


def _estimates(
    runs: list[Run],
    question: Question,
    estimator: Estimator,
    workers: Workers,
    progress: bool,
    path: Path | None = None,
) -> Iterator[tuple[tuple[Run, ...], Estimate]]:
    """Yield the estimates batch by batch."""
    processes = workers.processes_here()
    with _planned(runs, question, estimator, progress, path, processes=processes) as (plan, advance):
        yield from estimates(workers, estimator, question, plan, advance)


@contextmanager
def _planned(
    runs: list[Run],
    question: Question,
    estimator: Estimator,
    progress: bool,
    path: Path | None = None,
    answers: int = 1,
    processes: int = 1,
) -> Iterator[tuple[Plan, Advance]]:
    """Yield the estimator's plan, after checking that it fits, and the callback of the progress bar."""
    plan = estimator.plan(runs, question)
    check_resources(plan, estimator, runs, question, path, answers, processes)
    description, steps = f"{len(runs)} runs, {len(question.queries)} queries", sum(run.steps for run in runs)
    with progress_bar(description, "steps", steps, progress) as advance:
        yield plan, advance


def _usable_step(step: int | None, ensemble: Ensemble) -> int | None:
    if step is None:
        return None
    if isinstance(step, bool) or not isinstance(step, int):
        raise AttributionError(f"step={step!r} is not an integer. Give a step, or None for the end of each run.")
    shortest = min(ensemble, key=lambda run: run.steps)
    if not 1 <= step <= shortest.steps:
        raise AttributionError(
            f"Not all runs have a step {step}: {shortest.path} has {shortest.steps} steps. Give a step from 1 to "
            f"{shortest.steps}, or None for the end of each run."
        )
    return step
