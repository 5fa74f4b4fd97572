"""Findings as JSON, for programs that decide by them: the same figures and sentences as on the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from lightning_dtda.attribution.suggesting import Suggestion
from lightning_dtda.reporting.against_retraining import Retrained
from lightning_dtda.reporting.findings import Findings, Ranked


def as_json(found: Findings, compared: Retrained | None = None, suggestion: Suggestion | None = None) -> str:
    """Return findings as a JSON object: verdict, cautions, next steps, and the top examples, or groups, of each query.

    Influences are as they are shown, those of the spread in percent. Figures that are unknown or infinite are null.

    Args:
        found: The findings.
        compared: Predictions beside retraining.
        suggestion: Removals that were suggested.
    """
    content = {
        "question": found.question,
        "answer": found.answer,
        "verdict": asdict(found.verdict) | {"sentence": found.verdict.sentence},
        "agreement": found.agreement,
        "said": found.said,
        "cautions": found.cautions,
        "next_steps": [asdict(step) for step in found.next_steps],
        "queries": [
            {
                "query": found.attribution.queries[query.position],
                "name": query.name,
                "label": query.shown.label,
                "prediction": query.shown.prediction,
                "as_trained": query.as_trained.sentence,
                "differences": [_ranked(ranked) for ranked in query.ranked],
            }
            for query in found.queries
        ],
        "variance_by_source": None if found.sources is None else asdict(found.sources),
        "retrained": None if compared is None else asdict(compared),
        "suggestion": None
        if suggestion is None
        else {"verdict": suggestion.verdict, "best": suggestion.best, "removals": suggestion.removals},
    }
    return json.dumps(_finite(content), indent=1)


def _ranked(ranked: Ranked) -> dict[str, Any]:
    return {
        "name": ranked.difference.name,
        "title": ranked.words.title,
        "meaning": ranked.words.meaning,
        "unit": ranked.words.unit,
        "verdict": ranked.verdict,
        "significant": ranked.outcome.discoveries,
        "removals": ranked.outcome.removals,
        "rows": [asdict(row) for row in ranked.rows],
        "effects": [card.effect for card in ranked.cards],
    }


def _finite(content: Any) -> Any:
    """Replace figures that JSON does not have."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
