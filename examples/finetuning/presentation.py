"""What was found, in words and as a figure."""

import textwrap

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from examples.finetuning.reviews import Reviews
from examples.finetuning.scores import interval
from lightning_dtda import Attribution

GRAY, BLUE, ORANGE, GREEN = "#999999", "#0072b2", "#d55e00", "#009e73"
"""Of Okabe and Ito, safe for colour-blind readers."""


def print_sentences(asked: list[int], attributions: dict[str, Attribution], data: Reviews) -> None:
    """Print for each query the training sentences of the largest mean influence, with standard errors."""
    texts, labels = data.train["text"], data.train["label"]
    for name, attribution in attributions.items():
        mean, error = attribution.influence("mean"), attribution.standard_error("mean")
        for position, query in enumerate(asked):
            print(f"\n{name}: {data.validation[query]['text']} ({data.classes[data.validation[query]['label']]})")
            order = mean[position].argsort(descending=True).tolist()
            for k in (*order[:3], *order[-3:]):
                wrong = " (wrong label)" if data.wrong[k] else ""
                size = f"{mean[position, k]:+.3f} ± {error[position, k]:.3f}"
                print(f"  {size} {data.classes[labels[k]]}{wrong}: {texts[k]}")


def print_scores(rows: list[dict], texts: list[str], sizes: dict[str, dict], found: dict[str, dict]) -> None:
    """Print real and predicted changes of each query's loss, and the average precision of each method."""
    for place, (text, row) in enumerate(zip([*texts, "average"], rows, strict=True)):
        print(f"\n{text}")
        for name in ("chosen", "random"):
            print("  {}: {:+.3f} [{:+.3f}, {:+.3f}]".format(name, *interval(row[name])))
        print("  difference {:+.3f} [{:+.3f}, {:+.3f}], p {:.2g}".format(*row["paired"]), f"adjusted {row['holm']:.2g}")
        for name, size in sizes.items():
            shared = f"; {size['shared'][place]} of its first ten are these" if row is not rows[-1] else ""
            print(f"  predicted by {name}: {size['chosen'][place]:+.3f}{shared}")
    print("\nreal / predicted difference; correlation with retraining, less that of the first")
    for name, size in sizes.items():
        score, gain = size["evaluation"].scores["mean"], size["gain"]
        print("  {}: {:.2f} [{:.2f}, {:.2f}]".format(name, *size["ratio"]), f"(difference {size['difference']:+.3f});")
        limits = f"[{score.low:.2f}, {score.high:.2f}] of at most {score.ceiling or float('nan'):.2f}"
        print(f"    {score.score:.2f} {limits}; {gain.gain:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]")
    print("\naverage precision for wrong labels, less that of the first")
    for name, each in found.items():
        print(f"  {name}: {each['score']:.3f} [{each['low']:.3f}, {each['high']:.3f}], found {each['found']}", end="")
        print(
            "; {:+.3f} [{:+.3f}, {:+.3f}]".format(*each["less"]) + f" adjusted {each['holm']:.2g}"
            if "less" in each
            else ""
        )


def figure(rows: list[dict], texts: list[str], sizes: dict[str, dict], found: dict[str, dict]) -> go.Figure:
    """Draw real and predicted changes of each query's loss, and the average precision of each method."""
    titles = (
        "without 10 training sentences: change of the loss on a query",
        "finding wrong training labels",
    )
    plot = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.6, 0.4], horizontal_spacing=0.2)
    places = [len(rows) - 1 - row for row in range(len(rows))]  # the first query at the top
    for key, name, colour, shift in (("random", "10 random", GRAY, -0.16), ("chosen", "10 by influence", BLUE, 0.16)):
        for row, place in zip(rows, places, strict=True):
            dots = {"color": colour, "size": 5, "opacity": 0.45}
            plot.add_scatter(
                x=row[key], y=[place + shift] * len(row[key]), mode="markers", marker=dots, showlegend=False,
                row=1, col=1,
            )  # fmt: skip
        middle = [interval(row[key]) for row in rows]
        plot.add_scatter(
            x=[mean for mean, *_ in middle],
            y=[place + shift for place in places],
            error_x={"array": [high - mean for mean, _, high, _ in middle], "thickness": 2},
            mode="markers",
            marker={"color": colour, "size": 10, "line": {"color": "black", "width": 1}},
            name=f"{name}: real",
            row=1,
            col=1,
        )
    for estimator, name, symbol, colour in (
        ("influence", "influence functions", "x-thin", ORANGE),
        ("exact", "unrolling all steps", "diamond-open", GREEN),
    ):
        plot.add_scatter(
            x=sizes[estimator]["chosen"],
            y=[place + 0.36 for place in places],
            mode="markers",
            marker={"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
            name=f"predicted for these 10 by {name}",
            row=1,
            col=1,
        )
    methods = list(found.items())[::-1]
    plot.add_scatter(
        x=[each["score"] for _, each in methods],
        y=[name for name, _ in methods],
        error_x={
            "array": [each["high"] - each["score"] for _, each in methods],
            "arrayminus": [each["score"] - each["low"] for _, each in methods],
        },
        mode="markers",
        marker={"color": BLUE, "size": 10},
        showlegend=False,
        row=1,
        col=2,
    )
    chance = methods[0][1]["chance"]
    plot.add_vline(x=chance, line={"color": GRAY, "dash": "dash"}, annotation_text="random order", row=1, col=2)
    names = [textwrap.fill(text, 34).replace("\n", "<br>") for text in texts]
    names = [*names, f"<b>average of the {len(texts)}</b>"]
    plot.update_xaxes(
        title_text="change of the loss (nats); small: one seed; bars: 95 %", zerolinecolor="black", row=1, col=1
    )
    plot.update_xaxes(title_text="average precision, with 95 % interval", range=[0, 1], row=1, col=2)
    plot.update_yaxes(tickvals=places, ticktext=names, zeroline=False, row=1, col=1)
    legend = {"orientation": "h", "y": -0.14}
    return plot.update_layout(template="plotly_white", width=1200, height=620, legend=legend, margin={"t": 50, "r": 20})
