"""``attribute``: from recorded runs to an attribution."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.attribution.answering import Answering
from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.attribution_store import store_gallery
from lightning_dtda.attribution.gallery import Gallery
from lightning_dtda.attribution.gallery.filling import Show, Showing, filled, resolve_show
from lightning_dtda.attribution.gallery.model_outputs import model_outputs
from lightning_dtda.attribution.keeping import attribute_in_blocks
from lightning_dtda.attribution.kept import check_keep_top
from lightning_dtda.attribution.kept_store import KeptStore
from lightning_dtda.attribution.scales import ScaleName, check_scale
from lightning_dtda.compatibility import kinds
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import (
    Estimator,
    InfluenceFunctions,
    Question,
    UnrolledDifferentiation,
    resolve_removals,
)
from lightning_dtda.estimators.curvatures.curvature import Damping, check_damping
from lightning_dtda.estimators.removals import LEAVE_ONE_OUT
from lightning_dtda.execution import ThisProcess, Workers, workers_of
from lightning_dtda.execution.device import usable_device
from lightning_dtda.replay import (
    Draws,
    Measurement,
    dataset_fingerprint,
    query_examples,
    resolve_measurement,
    training_examples,
)
from lightning_dtda.replay.examples import query_names as names_of_queries
from lightning_dtda.replay.measuring import measure, nature
from lightning_dtda.replay.ranges import EVERYTHING
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.trajectory.traces import FIXED, fixed_sources
from lightning_dtda.version import __version__

_log = logging.getLogger(__name__)


@overload
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
    scale: ScaleName = "linear",
    measurement_draws: int = Draws.number,
    measurement_seed: int = Draws.seed,
    dampings: None = None,
    keep_top: int | None = None,
    scratch_budget: float = 2.0,
    device: torch.device | str | None = None,
    workers: int | Workers = 1,
    progress: bool = True,
    show: str | Show | None = None,
    query_names: Sequence[str] | None = None,
) -> Attribution: ...


@overload
def attribute(
    ensemble: Ensemble,
    module: LightningModule,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any],
    *,
    queries: DataLoader[Any] | Dataset[Any],
    dampings: Sequence[Damping],
    measurement: str | Measurement = "loss",
    estimator: Estimator | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    removals: Any = LEAVE_ONE_OUT,
    step: int | None = None,
    scale: ScaleName = "linear",
    measurement_draws: int = Draws.number,
    measurement_seed: int = Draws.seed,
    device: torch.device | str | None = None,
    progress: bool = True,
    show: str | Show | None = None,
    query_names: Sequence[str] | None = None,
) -> dict[Damping, Attribution]: ...


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
    scale: ScaleName = "linear",
    measurement_draws: int = Draws.number,
    measurement_seed: int = Draws.seed,
    dampings: Sequence[Damping] | None = None,
    keep_top: int | None = None,
    scratch_budget: float = 2.0,
    device: torch.device | str | None = None,
    workers: int | Workers = 1,
    progress: bool = True,
    show: str | Show | None = None,
    query_names: Sequence[str] | None = None,
) -> Attribution | dict[Damping, Attribution]:
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
        estimator: Method that computes the responses. Defaults to unrolled differentiation with
            ``horizon="auto"``.
        output: Directory for the result. Each batch of runs is stored there as soon as it is finished; after a crash,
            the same call continues where it stopped.
        overwrite: Whether to replace an attribution with other settings in ``output``.
        removals: What is removed: ``"leave-one-out"``, every example on its own; or groups of examples that are removed
            together, given as a list of groups, each a list of the indices of its examples; a mapping from names to
            such lists; a label for each example, one group for each label; or ``"column:KEY"``, where KEY is the
            position or the key of the labels in the data set's items.
        step: The step t after which m is measured; ``None`` means the end of each run, t = T.
        scale: Scale on which the responses are extrapolated, so that predictions stay where the measurement can be:
            ``"sqrt"`` for losses that are never negative, ``"logit"`` for probabilities; see
            :meth:`Attribution.on_scale <lightning_dtda.Attribution.on_scale>`. Without ``keep_top``, a finished
            attribution in ``output`` takes another scale at once.
        measurement_draws: Number of draws to average over if the measurement draws random numbers (such as the
            denoising loss of a diffusion model). All runs use the same draws.
        measurement_seed: Seed of these draws.
        dampings: Dampings, numbers or ``"auto"``, to use instead of the one of the curvature of influence functions.
            The curvature is fitted once for all of them. With an output, the attributions are stored in its directories
            ``damping-0.01`` and so on.
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
        show: Function, or its import path, that shows an item of the training data or the queries to people. It returns
            a :class:`~lightning_dtda.attribution.Shown`, a PIL image, a tensor or array, a text, a dictionary, or a
            figure of matplotlib or plotly. Without it, the usual kinds of items are shown; see
            :attr:`Attribution.gallery <lightning_dtda.Attribution.gallery>`. A finished attribution in ``output`` is
            shown in another way at once.
        query_names: Names of the queries for people, in their order; by default those of the data set's items.

    Returns:
        The attribution, with baseline ``(S, Q)`` and responses ``(S, Q, K)`` to K removals; K = N for leave-one-out.
        With ``dampings``, a dictionary with an attribution for each of them.

    Raises:
        AttributionError: If an argument is invalid, or there is not enough memory or disk space.
        ReplayError: If module or data differ from those of the recorded training.
        ExecutionError: If the device does not exist, or a worker fails.
    """
    if keep_top is not None:
        check_keep_top(keep_top)
        if not scratch_budget > 0:
            raise AttributionError(f"scratch_budget={scratch_budget}; give a positive number of GiB.")
    workers = workers_of(workers)
    if dampings is not None:
        estimator = InfluenceFunctions() if estimator is None else estimator
        _check_dampings(dampings, estimator, workers, keep_top)
    estimator = UnrolledDifferentiation() if estimator is None else estimator
    draws = Draws(measurement_draws, measurement_seed)
    question, about, names = _ask(
        ensemble, module, data, queries, measurement, estimator, removals, step, device, draws, scale
    )
    if keep_top is not None and "seeds" in about:
        raise AttributionError(
            "keep_top keeps what tests of independent runs need, but runs of this crossed ensemble share seeds. Leave "
            "out keep_top."
        )
    showing = Showing(question.examples, question.queries, (data, module), resolve_show(show), query_names)
    path = None if output is None else Path(output)
    if path is not None and "<" in (name := about["measurement"]):
        raise AttributionError(
            f"The measurement {name} has no unique name, so its stored results could be confused with those of "
            "another. Define it as a function at the top level of a Python module, or give no output."
        )
    answering = Answering(ensemble, question, estimator, workers, about, names, overwrite, progress, dampings)
    if keep_top is None:
        answers = answering.answer(path)
    else:
        store = None
        if path is not None:
            store = KeptStore.create(path, about | {"keep_top": keep_top}, names, *answering.asked, overwrite)
        answers = [
            attribute_in_blocks(
                *(ensemble, question, estimator, keep_top, scratch_budget, store),
                lambda numbers, scratch: answering.part(numbers).answer(scratch)[0],
            )
        ]
    outputs = model_outputs(list(ensemble), question)
    for number, answer in enumerate(answers):
        _log_trust(answer)
        where = path if dampings is None else answer.path
        gallery = filled(replace(answer, gallery=Gallery()), showing, outputs)
        if where is not None:
            store_gallery(where, gallery)
        answers[number] = replace(answer, gallery=gallery, path=where)
    return answers[0] if dampings is None else dict(zip(dampings, answers, strict=True))


def _check_dampings(dampings: Sequence[Damping], estimator: Estimator, workers: Workers, keep_top: int | None) -> None:
    if not isinstance(estimator, InfluenceFunctions):
        raise AttributionError(
            f"{type(estimator).__name__} has no damping. Use InfluenceFunctions, or leave out dampings."
        )
    if not dampings or len(set(dampings)) != len(dampings):
        raise AttributionError(f"dampings={dampings!r}; give at least one damping, each only once.")
    for damping in dampings:
        check_damping(damping)
    if not isinstance(workers, ThisProcess):
        raise AttributionError("dampings cannot be combined with workers. Leave out workers.")
    if keep_top is not None:
        raise AttributionError(
            "dampings cannot be combined with keep_top. Leave out keep_top, or leave out dampings and set a single "
            "damping in the estimator's curvature."
        )


def _log_trust(answer: Attribution) -> None:
    """Log the drift of the replay, and warn of runs that cannot be trusted."""
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
    scale: ScaleName = "linear",
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
    first = nature(replay.eager, question.queries, function, replay.time(replay.steps))
    check_scale(scale, torch.empty(0), name)
    if scale != "linear":  # measured before the work, not after it; one run says what kind of measurement it is
        end = question.end(replay.steps)
        trained = *replay.trained(end), question.queries, function, replay.time(end), draws
        check_scale(scale, measure(replay.eager, *trained), name)
    about = {
        "measurement": name,
        "draws": asdict(draws) if first.is_random else None,
        "range": None if first.range == EVERYTHING else [end if math.isfinite(end) else None for end in first.range],
        "scale": scale,
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
    if seeds := {run.name: run.manifest.seeds for run in ensemble if run.manifest.seeds is not None}:
        about["seeds"] = seeds
        if len(seeds) == len(ensemble) and (fixed := fixed_sources(ensemble)):
            about["fixed_sources"] = fixed
            for source in fixed:
                _log.warning("Runs that differ only in the seed of the %s %s.", source, FIXED[source])
    return question, about, names_of_queries(question.queries)


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
