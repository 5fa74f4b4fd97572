"""Answers to a question: computed batch by batch, in memory or stored run by run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.attribution_store import AttributionStore, with_runs
from lightning_dtda.attribution.resources import check_resources
from lightning_dtda.attribution.run_batches import estimates
from lightning_dtda.attribution.trust import sizes
from lightning_dtda.estimators import Estimate, Estimator, InfluenceFunctions, Plan, Question
from lightning_dtda.estimators.curvatures.curvature import Damping
from lightning_dtda.estimators.estimator import Advance
from lightning_dtda.execution import Workers
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.trajectory import Ensemble, Run

_log = logging.getLogger(__name__)

RunAnswer: TypeAlias = tuple[str, Tensor, Tensor, dict[str, Any]]
"""A run's name, baseline ``(queries,)``, responses ``(queries, removals)`` and facts."""


def damping_path(output: Path, damping: Damping) -> Path:
    """Return the directory of the attribution with one of several dampings."""
    return output / f"damping-{damping}"


@dataclass(frozen=True)
class Answering:
    """A question about an ensemble, and how it is answered.

    Args:
        ensemble: The runs.
        question: The question.
        estimator: Estimator that answers it.
        workers: Workers to compute on.
        about: The part of ``Attribution.about`` that describes the question.
        names: Names of the queries.
        overwrite: Whether to replace answers to other questions on disk.
        progress: Whether to show a progress bar.
        dampings: Dampings of influence functions, each of which gives an answer; ``None`` for one answer by the
            estimator as it is.
    """

    ensemble: Ensemble
    question: Question
    estimator: Estimator
    workers: Workers
    about: dict[str, Any]
    names: tuple[int, ...]
    overwrite: bool
    progress: bool
    dampings: Sequence[Damping] | None = None

    @property
    def asked(self) -> tuple[int, dict[str, int | None]]:
        """Number of removals, and the checksum of each run by name: what a store compares with its content."""
        return len(self.question.removals), {
            run.name: run.checksum for run in sorted(self.ensemble, key=lambda run: run.name)
        }

    def part(self, numbers: range) -> Answering:
        """Return the same for a part of the queries."""
        if len(numbers) == len(self.names):
            return self
        question = replace(self.question, queries=self.question.queries.stretch(numbers))
        return replace(self, question=question, names=self.names[numbers.start : numbers.stop])

    def answer(self, output: Path | None) -> list[Attribution]:
        """Answer the question for each damping, in this order, or once without dampings.

        Args:
            output: Directory of the answer, or of :func:`damping_path`; ``None`` keeps answers in memory. On disk, runs
                whose answers are already there are left out.
        """
        versions = self._versions()
        if output is None:
            answers = sorted(self._run_by_run(list(self.ensemble), None), key=lambda of_run: of_run[0][0])
            return [
                self._assembled(of_version, about)
                for of_version, (_, about) in zip(zip(*answers, strict=True), versions, strict=True)
            ]
        stores = [
            AttributionStore.create(
                output if damping is None else damping_path(output, damping),
                *(about, self.names, *self.asked, self.overwrite),
            )
            for damping, about in versions
        ]
        finished = set.intersection(*(set(store.finished) for store in stores))
        if remaining := [run for run in self.ensemble if run.name not in finished]:
            if finished:
                _log.info("%d of %d runs are already attributed in %s.", len(finished), len(self.ensemble), output)
            for of_run in self._run_by_run(remaining, output):
                for store, answer in zip(stores, of_run, strict=True):
                    store.add(*answer)
        return [Attribution.load(store.path) for store in stores]

    def _versions(self) -> list[tuple[Damping | None, dict[str, Any]]]:
        """Return each damping with the description of its answer."""
        if self.dampings is None:
            return [(None, self.about)]
        settings = self.about["estimator"]
        curvature = settings["curvature"]
        return [
            (damping, self.about | {"estimator": settings | {"curvature": curvature | {"damping": damping}}})
            for damping in self.dampings
        ]

    def _assembled(self, answers: Sequence[RunAnswer], about: dict[str, Any]) -> Attribution:
        runs, baselines, responses, facts = zip(*answers, strict=True)
        about = with_runs(about, dict(zip(runs, facts, strict=True)))
        return Attribution(torch.stack(baselines), torch.stack(responses), runs, self.names, about)

    def _run_by_run(self, runs: list[Run], output: Path | None) -> Iterator[list[RunAnswer]]:
        """Yield each run's answers, one for each version."""
        for batch, versions in self._estimates(runs, output):
            for number in range(len(batch)):
                yield [_of_run(batch[number].name, estimate, number) for estimate in versions]

    def _estimates(self, runs: list[Run], output: Path | None) -> Iterator[tuple[tuple[Run, ...], list[Estimate]]]:
        """Yield the estimates batch by batch, one for each version."""
        with self._planned(runs, output) as (plan, advance):
            if self.dampings is None:
                for batch, estimate in estimates(self.workers, self.estimator, self.question, plan, advance):
                    yield batch, [estimate]
            else:
                assert isinstance(self.estimator, InfluenceFunctions)
                for batch in plan.batches:
                    yield (
                        batch,
                        self.estimator.estimate_dampings(batch, self.question, plan, advance, self.dampings),
                    )

    @contextmanager
    def _planned(self, runs: list[Run], output: Path | None) -> Iterator[tuple[Plan, Advance]]:
        """Yield the estimator's plan, after checking that it fits, and the callback of the progress bar."""
        plan = self.estimator.plan(runs, self.question)
        answers = 1 if self.dampings is None else len(self.dampings)
        check_resources(plan, self.estimator, runs, self.question, output, answers, self.workers.processes_here())
        description = f"{len(runs)} runs, {len(self.question.queries)} queries"
        with progress_bar(description, "steps", sum(run.steps for run in runs), self.progress) as advance:
            yield plan, advance


def _of_run(name: str, estimate: Estimate, number: int) -> RunAnswer:
    """Return the answer for one run of a batch."""
    norms = estimate.adjoint_norms[number] if estimate.adjoint_norms else {}
    diagnosis = asdict(estimate.diagnoses[number]) if estimate.diagnoses else {}
    known = {"drift": asdict(estimate.drift[number]), "adjoint_norms": norms, "diagnosis": diagnosis}
    baseline, responses = estimate.baseline[number], estimate.responses[number]
    return name, baseline.cpu(), responses.cpu(), known | sizes(responses)
