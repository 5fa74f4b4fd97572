"""The style that all figures share."""

from __future__ import annotations

import plotly.graph_objects as go

# Okabe and Ito's palette: distinguishable with every common colour blindness
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
MUTED = "#A6ADB8"
INK = "#1F2933"
FAINT = "#E4E7EB"

_AXIS = {
    "gridcolor": FAINT,
    "zerolinecolor": "#7B8794",
    "zerolinewidth": 1,
    "linecolor": FAINT,
    "ticks": "",
    "exponentformat": "power",
    "automargin": True,
    "title": {"font": {"size": 12}, "standoff": 12},
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        "title": {"font": {"size": 15}, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"l": 12, "t": 16}},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hoverlabel": {"bgcolor": "white", "bordercolor": MUTED, "font": {"color": INK}},
        "hovermode": "closest",
        # at the bottom, where wrapping on a narrow screen shrinks nothing but the plot
        "legend": {
            "title": {"font": {"size": 12}},
            "orientation": "h",
            "x": 0,
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
        },
        "margin": {"l": 56, "r": 20, "t": 48, "b": 52},
        "height": 440,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def figure(title: str, **layout: object) -> go.Figure:
    """Return an empty figure in this style."""
    return go.Figure(layout={"template": TEMPLATE, "title": {"text": title}, **layout})
