"""The arrangement of the panels: a workspace to save in W&B, and a report to start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from lightning_dtda.errors import DTDAError

_SIGN = (
    "Every influence is the change when the example is removed: +0.05 on the mean of a loss means that without this "
    "example the mean loss over seeds would be 0.05 higher. Those marked as significant are more than seed noise, at a "
    "false discovery rate of 5 % among all examples."
)
_FILTER = 'Metric("JobType") != "training"'
_PINNED = ("usable", "verdict", "cautions", "significant/mean", "significant/spread", "agreement")


def wandb_workspace(entity: str, project: str, metrics: Sequence[str] = ()) -> Any:
    """Return a workspace for everything that lightning-dtda logs; its ``save`` method saves it in W&B.

    Args:
        entity: Entity, a user or a team.
        project: Project.
        metrics: Metrics that the trainings log, such as ``val_loss``, whose spread over seeds is to be shown.

    Raises:
        DTDAError: If ``wandb-workspaces`` is not installed.

    Example:
        ``wandb_workspace("my-team", "concrete", metrics=["val_loss"]).save()``
    """
    panels, workspaces = _modules()
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Training data attribution",
        sections=[
            workspaces.Section(name=title, panels=of_section, is_open=True)
            for title, _, of_section in _sections(panels, metrics)
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=_FILTER,
            pinned_columns=["run:displayName", *(f"summary:{name}" for name in _PINNED)],
        ),
    )


def wandb_report(entity: str, project: str, metrics: Sequence[str] = ()) -> Any:
    """Return a W&B report to write in: the panels of the workspace, with what they show; ``save`` makes it a draft.

    Args:
        entity: Entity, a user or a team.
        project: Project.
        metrics: Metrics that the trainings log, whose spread over seeds is to be shown.

    Raises:
        DTDAError: If ``wandb-workspaces`` is not installed.
    """
    panels, _ = _modules()
    runs = panels.Runset(entity=entity, project=project, name="Attributions", filters=_FILTER)
    blocks: list[Any] = [panels.P(_SIGN)]
    for title, meaning, of_section in _sections(panels, metrics):
        blocks += [panels.H2(title), panels.P(meaning), panels.PanelGrid(runsets=[runs], panels=of_section)]
    return panels.Report(
        entity=entity,
        project=project,
        title="Which training examples make the result, and which make it depend on the seed?",
        blocks=blocks,
    )


def _sections(panels: ModuleType, metrics: Sequence[str]) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield title, meaning and panels of each section."""
    yield (
        "What was found",
        "The whole report: verdict, cautions, tables and figures of every query that is shown.",
        [panels.MediaBrowser(title="Report", media_keys=["report"], num_columns=1)],
    )
    yield (
        "The examples",
        "A query and the examples whose removal changes its spread most; the slider goes from the least to the most "
        "affected query. The table has the top examples of all queries.",
        [
            panels.MediaBrowser(title="Query and top examples", media_keys=["queries/pictures"]),
            panels.WeavePanelSummaryTable(table_name="top_examples"),
        ],
    )
    what = "Change if the example is removed, on the most affected query"
    yield (
        "The most affected query",
        "Its top examples, every example by its change of mean and spread, and the measurement in each run as trained "
        "and without the top example.",
        [
            _chart(panels, "top_mean", "bar", f"{what}: mean", label="removed", value="influence"),
            _chart(panels, "top_spread", "bar", f"{what}: spread, in %", label="removed", value="influence"),
            _chart(
                panels,
                "mean_against_spread",
                "scatter",
                f"{what}: mean and spread",
                x="change of the mean",
                y="change of the standard deviation in percent",
            ),
            _chart(
                panels,
                "distribution",
                "lineseries",
                "The measurement in each run, from lowest to highest",
                step="step",
                lineKey="lineKey",
                lineVal="lineVal",
            ),
        ],
    )
    queries = {
        "Significant examples": ["significant_mean", "significant_spread"],
        "Largest change of the standard deviation, in %": ["largest_spread"],
        "Mean over seeds": ["mean"],
        "Standard deviation over seeds": ["standard_deviation"],
    }
    yield (
        "Query by query",
        "From the least to the most affected query.",
        [_lines(panels, title, [f"queries/{key}" for key in keys]) for title, keys in queries.items()],
    )
    if metrics:
        yield (
            "Spread over seeds",
            "What the recorded trainings logged at their end, over seeds.",
            [
                panels.BarPlot(title=f"{name}: {figure}", metrics=[f"seeds/{name}/{figure.replace(' ', '_')}"])
                for name in metrics
                for figure in ("mean", "standard deviation")
            ],
        )
    yield (
        "Does it predict retraining?",
        "Rank correlation of predicted and retrained changes, and the best that the noise of retraining allows.",
        [
            panels.BarPlot(title=f"Change of the {name}", metrics=[f"score/{name}", f"noise_ceiling/{name}"])
            for name in ("mean", "wasserstein")
        ],
    )
    effects = [f"removals/predicted_{end}" for end in ("effect", "low", "high")]
    yield (
        "Suggested removals",
        "Predicted effect of the first removals together, with its interval on runs that did not choose them.",
        [_lines(panels, "Predicted effect, by the number of examples removed", effects, x="removals/examples")],
    )


def _lines(panels: ModuleType, title: str, keys: list[str], x: str = "Step") -> Any:
    return panels.LinePlot(title=title, x=x, y=keys)


def _chart(panels: ModuleType, key: str, kind: str, title: str, **fields: str) -> Any:
    return panels.CustomChart(
        chart_name=f"wandb/{kind}/v0",
        query={"summaryTable": {"tableKey": f"top_query/{key}_table"}},
        chart_fields=fields,
        chart_strings={"title": title},
    )


def _modules() -> tuple[ModuleType, ModuleType]:
    try:
        import wandb_workspaces.reports.v2 as panels
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise DTDAError(
            'Workspaces and reports of W&B need wandb-workspaces. Install it with: pip install "lightning-dtda[wandb]"'
        ) from error
    return panels, workspaces
