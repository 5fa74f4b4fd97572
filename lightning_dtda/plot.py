"""Figures of an attribution, one function for each question. Each returns a plotly figure to show or to change.

=================  =========================================================================================
:func:`everything`   Which examples stand out? Mean against spread influence of all, on one query.
:func:`top`          Which matter most, and how sure is it? The largest influences with their intervals.
:func:`without`      What happens without them? The measurement in every run, as trained and predicted.
:func:`baseline`     How much depends on the seed alone? The measurement as trained, over runs.
:func:`adjoints`     How long does an early change matter? The norm of each run's adjoint over the steps.
=================  =========================================================================================

Example:
    >>> import torch
    >>> from lightning_dtda import Attribution, plot
    >>> attribution = Attribution(torch.randn(9, 2), torch.randn(9, 2, 30), tuple("abcdefghi"), (0, 1))
    >>> plot.top(attribution, 0, "spread", k=5).layout.title.text
    'Spread influence, query 0'
"""

from lightning_dtda.reporting.figures import adjoint_figure as adjoints
from lightning_dtda.reporting.figures import baseline_figure as baseline
from lightning_dtda.reporting.figures import influence_figure as everything
from lightning_dtda.reporting.figures import removal_figure as without
from lightning_dtda.reporting.figures import top_figure as top

__all__ = ["adjoints", "baseline", "everything", "top", "without"]
