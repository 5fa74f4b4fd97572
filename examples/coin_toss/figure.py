"""The picture: undecided cases with and without a few rows, and the flip rates by method."""

from plotly.subplots import make_subplots

COLOURS, SYMBOLS = ("#0072b2", "#d55e00", "#009e73"), ("circle", "diamond", "square")
EXAMPLES, ROWS = 3, 5
"""Number of undecided images to show, and of the rows that are removed for each."""


def draw(fold: dict, results: dict, methods: tuple[str, ...], shares: list[float]):
    """Draw undecided cases of a quarter, and the changes of the flip rate by method.

    Cases are the margins of the most undecided one, or the first few images, which are in random order.
    """
    images = len(fold["data"].held_out.tensors[0][0]) == 196
    plot = _images(fold, results) if images else _margins(fold, results)
    where = {"row": 1, "col": ROWS + 3 if images else 2}
    for number, (share, colour, symbol) in enumerate(zip(shares, COLOURS, SYMBOLS, strict=False)):
        shown = [method for method in methods if f"{share:g} {method}" in results]
        found = [results[f"{share:g} {method}"]["flip rate"] for method in shown]
        plot.add_scatter(
            x=[100 * each[0] for each in found],
            y=[methods.index(method) + 0.45 * (number / max(1, len(shares) - 1) - 0.5) for method in shown],
            error_x={"array": [100 * (each[2] - each[0]) for each in found], "width": 0, "thickness": 1.5},
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9},
            name=f"{100 * share:g} % of the rows removed",
            **where,
        )
    plot.add_vline(0, line_dash="dot", **where)
    plot.update_xaxes(title_text="change of the flip rate (percentage points; 95 % intervals)", **where)
    plot.update_yaxes(tickvals=list(range(len(methods))), ticktext=list(methods), autorange="reversed", **where)
    legend = {"orientation": "h", "y": 1.25, "x": 0.55 if images else 0}
    return plot.update_layout(template="plotly_white", barmode="overlay", width=1200, height=600, legend=legend)


def _margins(fold: dict, results: dict):
    """Draw the margins of the most undecided case with all rows and without a few, on the left of two panels."""
    data, alone = fold["data"], max(fold["alone"], key=lambda case: case["share"])
    before = fold["before"][:, alone["query"]]
    truth = data.classes[int(data.held_out.tensors[1][alone["query"]])]
    titles = f"the most undecided case: {truth}; {len(before)} fresh seeds", f"all {results['cases']} undecided cases"
    plot = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.45, 0.55], horizontal_spacing=0.2)
    drawn = (before, "all rows", "#999999"), (alone["margins"], f"without {len(alone['rows'])} rows", COLOURS[0])
    for margins, name, colour in drawn:
        plot.add_histogram(
            x=margins.tolist(),
            histnorm="probability",
            nbinsx=40,
            opacity=0.55,
            marker_color=colour,
            name=f"{name}: right with {100 * float((margins > 0).double().mean()):.0f} % of the seeds",
            row=1,
            col=1,
        )
    plot.add_vline(0, line_dash="dot", row=1, col=1)
    rows = "<br>".join(map(data.described, alone["rows"]))
    below = f"<br><br><span style='font-size:11px'>rows removed<br>{rows}</span>"
    plot.update_xaxes(title_text=f"margin: right if above 0{below}", col=1)
    return plot.update_yaxes(title_text="share of the seeds", col=1)


def _images(fold: dict, results: dict):
    """Draw the first undecided images beside the rows removed for each, on the left of the last column."""
    data, columns = fold["data"], ROWS + 3  # the image, its rows, space for names of methods, flip rates
    cases = fold["alone"][:EXAMPLES]
    titles = []
    for case in cases:
        names = (data.described(row).replace(", ", "<br>") for row in case["rows"][:ROWS])
        before, after = (
            100 * min(right, 1 - right)
            for right in (float((m > 0).double().mean()) for m in (fold["before"][:, case["query"]], case["margins"]))
        )
        truth = data.classes[int(data.held_out.tensors[1][case["query"]])]
        titles += [f"{truth}<br><b>flips: {before:.0f} → {after:.0f} %</b>", *names]
        titles += [f"all {results['cases']} undecided images"] if case is cases[0] else []
    empty = [None] * (columns - ROWS - 2)
    panels = [
        [{}] * (ROWS + 1) + empty + [{"rowspan": len(cases)} if number == 0 else None] for number in range(len(cases))
    ]
    widths = [0.08] * (ROWS + 1) + [0.13, 0.39]
    plot = make_subplots(
        len(cases), columns, specs=panels, subplot_titles=titles, column_widths=widths, horizontal_spacing=0.008
    )
    for number, case in enumerate(cases, 1):
        pixels = [data.inputs[data.held_out_rows[case["query"]]]]
        pixels += [data.inputs[data.rows[row]] for row in case["rows"][:ROWS]]
        for column, image in enumerate(pixels, 1):
            where = {"row": number, "col": column}
            plot.add_heatmap(z=image.view(14, 14).flip(0).tolist(), colorscale="Greys", showscale=False, **where)
            plot.update_xaxes(visible=False, constrain="domain", **where)
            plot.update_yaxes(visible=False, scaleanchor=plot.data[-1].xaxis, constrain="domain", **where)
    of_rows = f"first {ROWS} of the {len(cases[0]['rows'])} rows removed for it"
    for x, text in ((0, "undecided image"), (0.13, of_rows)):
        plot.add_annotation(x=x, y=1.18, xref="paper", yref="paper", xanchor="left", text=text, showarrow=False)
    return plot.update_annotations(font_size=12)
