"""The comparison of an attribution with retraining, as a run of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from lightning_dtda.evaluation.comparing import Comparison
from lightning_dtda.evaluation.evaluating import Evaluation
from lightning_dtda.reporting.weights_and_biases.summary_run import artifact, known, summary_run, use
from lightning_dtda.reporting.wording import counted

_COLUMNS = ("score", "low", "high", "noise_ceiling")


def log_evaluation_to_wandb(
    evaluation: Evaluation,
    name: str,
    *,
    attribution: str | Path | None = None,
    truth: str | Path | None = None,
    gains: Mapping[str, Comparison] | None = None,
    ensemble: str | None = None,
    **settings: Any,
) -> str:
    """Log how well an attribution predicts retraining; several of them line up as runs of one workspace.

    The run has the linear datamodeling score of each difference with its interval and noise ceiling, and one step for
    each query.

    Args:
        evaluation: The evaluation.
        name: Name of the attribution.
        attribution: Directory of the attribution, for the lineage.
        truth: Directory of the ground truth, for the lineage.
        gains: How much higher the attribution scores than another one, from
            :func:`~lightning_dtda.evaluation.compare`.
        ensemble: Name of the ensemble, the default of the run's group.
        **settings: Arguments of ``wandb.init``, as for :func:`~lightning_dtda.reporting.log_to_wandb`.

    Returns:
        The id of the run.

    Raises:
        AttributionError: If a directory does not exist.
    """
    inputs = [
        artifact(kind, ensemble, path, {})
        for kind, path in {"attribution": attribution, "truth": truth}.items()
        if path is not None
    ]
    config = {
        "measurement": evaluation.measurement,
        "attribution": name,
        "removal": evaluation.removal,
        "ensemble": ensemble,
        "runs": evaluation.runs,
        "subsets": evaluation.subsets,
        "seeds": evaluation.seeds,
        "baseline_seeds": evaluation.baseline_seeds,
        "queries": evaluation.queries,
        "confidence": evaluation.confidence,
    }
    rows = [
        [difference, *(None if figure is None else known(figure) for figure in figures)]
        for difference, score in evaluation.scores.items()
        for figures in [(score.score, score.low, score.high, score.ceiling)]
    ]
    summary = {f"{column}/{row[0]}": figure for row in rows for column, figure in zip(_COLUMNS, row[1:], strict=True)}
    for difference, gain in (gains or {}).items():
        for column, figure in (("gain", gain.gain), ("gain_low", gain.low), ("gain_high", gain.high)):
            summary[f"{column}/{difference}"] = known(figure)
    notes = (
        f"Do predictions rank {counted(evaluation.subsets, 'removal')} as retraining does? Rank correlation, mean over "
        f"{counted(evaluation.queries, 'query', 'queries')}; {evaluation.seeds} trainings without each of the removals."
    )
    question = f"{name}: does it rank removals as retraining does?"
    with summary_run("evaluation", question, config, [evaluation.measurement], notes, settings) as run:
        for made in inputs:
            use(run, made)
        for query in range(evaluation.queries):
            scores = {difference: score.per_query[query] for difference, score in evaluation.scores.items()}
            run.log({f"queries/score_{difference}": score for difference, score in scores.items() if score is not None})
        table = wandb.Table(["difference", *_COLUMNS], data=rows)
        title = "Rank correlation with retraining"
        run.log({"scores": wandb.plot.bar(table, "difference", "score", title=title)})
        run.summary.update(summary)
    return str(run.id)
