"""One file to hand to colleagues: no server, no network, no other files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.gallery.filling import Show, gallery_of
from lightning_dtda.attribution.suggesting import Suggestion
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.against_retraining import retrained, suggested
from lightning_dtda.reporting.by_source import refuse_parts
from lightning_dtda.reporting.certainty import FDR, NEGLIGIBLE, PLANNING, POWER
from lightning_dtda.reporting.facts import about_in_brief
from lightning_dtda.reporting.figure_style import TEMPLATE
from lightning_dtda.reporting.findings import MOST_MEMBERS, Findings, find
from lightning_dtda.reporting.formatting import capital
from lightning_dtda.reporting.machine_readable import as_json
from lightning_dtda.reporting.page_data import Overview, content, packed, rows_listed
from lightning_dtda.reporting.stability_card import stability_card
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.trajectory.storage import replace_file
from lightning_dtda.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from torch.utils.data import DataLoader, Dataset

Format = Literal["html", "json", "card"]


def report(
    attribution: Attribution,
    output: str | Path,
    k: int = 10,
    differences: Sequence[str | Difference] | None = None,
    truth: GroundTruth | None = None,
    suggestion: Suggestion | None = None,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any] | None = None,
    queries: DataLoader[Any] | Dataset[Any] | None = None,
    show: str | Show | None = None,
    progress: bool = True,
    format: Format | None = None,
) -> Path:
    """Write a report on an attribution: one self-contained HTML file, its findings as JSON, or a card in Markdown.

    Its first screen says whether the attribution can be used, shows a query with the examples that matter most to it
    and what happens without them, and what to do now, with commands to copy. All queries and examples are reached by
    tables that can be searched, sorted and downloaded. It opens without a network.

    Of each query and difference, at least the k examples, or groups, with the largest influences are listed, and up to
    :data:`~lightning_dtda.reporting.page_data.MOST_NUMBERS` figures in all: of small attributions, everything.

    Args:
        attribution: The attribution.
        output: File to write; its folder is created if it does not exist.
        k: Number of examples, or groups, that are listed at least.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`. ``None`` means mean,
            spread and Wasserstein. Differences without a test of their own, such as quantiles, are tested by 2,000
            random exchanges of X and Y: about a second per query for 20 runs and 1000 examples.
        truth: Ground truth to show predictions beside, for the same queries and measurement; its complete part is used.
        suggestion: Removals that were suggested, to show, with what retraining says of them if the truth has their set.
        data: Training data, as for :func:`~lightning_dtda.attribute`, to show its examples where the attribution's own
            gallery does not, or by another function.
        queries: Data set or loader of the queries, to show them.
        show: Function that shows an item, as for :func:`~lightning_dtda.attribute`.
        progress: Whether to show a progress bar if it takes more than a few seconds.
        format: ``"html"``: a page for people. ``"json"``: the verdict, next steps and the k top examples of each query,
            for programs that decide by them. ``"card"``: a section of Markdown for a model card, with the queries that
            depend most on the seed and the examples behind it. ``None`` goes by the ending of ``output``: ``.json``,
            ``.md``, or anything else for HTML.

    Returns:
        The path of the file.

    Raises:
        AttributionError: If ``k`` is less than one, a difference is unknown or needs more runs, truth, data or queries
            do not match, or the file cannot be written.
        RetrainingError: If no part of the truth is complete.

    Example:
        >>> import tempfile, torch
        >>> attribution = Attribution(torch.randn(9, 2), torch.randn(9, 2, 30), tuple("abcdefghi"), (0, 1))
        >>> report(attribution, Path(tempfile.mkdtemp()) / "report.html", progress=False).name
        'report.html'
    """
    if show is not None and data is None and queries is None:
        raise AttributionError("show needs data or queries to show. Give data=, queries=, or both.")
    if data is not None or queries is not None:
        attribution = replace(attribution, gallery=gallery_of(attribution, data, queries, show))
    if format not in (None, *get_args(Format)):
        raise AttributionError(f"format={format!r}; choose from {', '.join(get_args(Format))}.")
    output, trusted = Path(output), attribution.independent().trusted()
    chosen = [resolve_difference(each) for each in differences or trusted.available_differences]
    refuse_parts(chosen)
    truth = truth.finished() if truth is not None and truth.unfinished else truth
    # first, as it may refuse the truth
    compared = None if truth is None else retrained(trusted, truth, chosen)
    if format is None:
        format = {".json": "json", ".md": "card"}.get(output.suffix, "html")  # type: ignore[assignment]
    if format == "json":
        return _written(output, as_json(find(attribution, k, chosen, progress), compared, suggestion))
    if format == "card":
        named = [each for each in chosen if each.signed]
        return _written(output, stability_card(find(attribution, k, named, progress), compared))
    overview = Overview(len(chosen), len(attribution.queries))
    findings = find(attribution, k, chosen, progress, rows_listed(trusted, len(chosen), k), overview)
    drawn = content(findings, overview)
    drawn["retrained"] = None if compared is None else asdict(compared)
    said = [] if suggestion is None else suggested(suggestion, truth)
    drawn["suggestion"] = [] if suggestion is None else _suggested_cards(attribution, suggestion)
    environment = Environment(
        loader=PackageLoader("lightning_dtda.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(capital=capital, first_sentence=_first_sentence)
    page = environment.get_template("report.html.jinja").render(
        **_static(findings, trusted),
        file=_file,
        template=_script_safe(json.dumps(TEMPLATE.to_plotly_json())),
        data=packed(drawn),
        queries_shown=len(drawn["queries"]),
        has_adjoints=bool(drawn["adjoints"]),
        retrained=compared,
        suggestion={"said": said} if suggestion is not None else None,
    )
    return _written(output, page)


def _written(output: Path, text: str) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, text.encode())
    except OSError as error:
        raise AttributionError(
            f"The report cannot be written to {output} ({error}). Give another file name."
        ) from error
    return output


def _static(findings: Findings, trusted: Attribution) -> dict[str, Any]:
    """Return what the page says without JavaScript: what was asked of all runs, found with the trusted ones."""
    return {
        "findings": findings,
        "runs": trusted.runs,
        "estimator": wording.estimator(findings.attribution),
        "drift": wording.drift(findings.attribution),
        "diagnosis": wording.diagnosis(trusted),
        "reliability": wording.reliability(trusted),
        "removals": f"{trusted.responses.shape[2]:,}",
        "noun": wording.noun(trusted),
        "a_noun": "an example" if trusted.removals is None else "a group",
        "about": json.dumps(about_in_brief(trusted), indent=2, default=str),
        "fdr": f"{100 * FDR:g} %",
        "power": f"{100 * POWER:g} %",
        "planning": f"{100 * PLANNING:g} %",
        "negligible": f"{100 * NEGLIGIBLE:g} %",
        "by_chance": f"{round(trusted.responses.shape[2] * 0.05):,}",
        "version": __version__,
    }


def _suggested_cards(attribution: Attribution, suggestion: Suggestion) -> list[dict[str, Any]]:
    """Return the suggested removals to show: their names, and the training examples that each adds to the set."""
    before: tuple[int, ...] = ()
    cards = []
    number = suggestion.best or len(suggestion.removals)
    for step, (name, removed) in enumerate(zip(suggestion.removals[:number], suggestion.sets, strict=False), start=1):
        added = [index for index in removed if index not in before]
        cards.append(
            {
                "name": f"{wording.noun(attribution)} {name}",
                "examples": added[:MOST_MEMBERS],
                "effect": f"After {wording.counted(step, 'removal')}: {suggestion.quantity} {suggestion.effect(step)}.",
            }
        )
        before = removed
    return cards


def _first_sentence(text: str) -> tuple[str, str]:
    """Return a text's first sentence, and the rest."""
    first, stop, rest = text.partition(". ")
    return first + stop.strip(), rest


def _file(name: str) -> Markup:
    """Return a file of this package, as it is."""
    return Markup((files("lightning_dtda.reporting") / name).read_text(encoding="utf-8"))


def _script_safe(text: str) -> Markup:
    # in JSON, "<" only occurs inside strings, where it can be escaped; then nothing closes the script element
    return Markup(text.replace("<", "\\u003c"))
