"""The picture: an undecided case with and without a few rows, and the flip rates by method."""

from plotly.subplots import make_subplots

COLOURS, SYMBOLS = ("#0072b2", "#d55e00", "#009e73"), ("circle", "diamond", "square")


def described(data, row: int) -> str:
    """Return a training row in its own units."""
    label = int(data.train.tensors[1][row])
    words = data.classes[label] + (", wrong label" if row in data.wrong.tolist() else "")
    values = data.inputs[data.rows[row]]
    if len(values) != 30:
        return f"image {int(data.rows[row])}: {words}"
    return f"row {row}: radius {values[0]:.1f}, texture {values[1]:.1f}, concave points {values[7]:.3f}; {words}"


def draw(fold: dict, results: dict, methods: tuple[str, ...], shares: list[float]):
    """Draw the margins of the most undecided case, and the changes of the flip rate by method."""
    data, case = fold["data"], fold["alone"]["query"]
    without, before = fold["alone"]["margins"].double(), fold["before"][:, case]
    truth = data.classes[int(data.held_out.tensors[1][case])]
    rows = "<br>".join(described(data, row) for row in fold["alone"]["rows"])
    plot = make_subplots(
        1,
        2,
        subplot_titles=(
            f"the most undecided case: {truth}; {len(before)} fresh seeds",
            f"all {results['cases']} undecided cases",
        ),
        column_widths=[0.45, 0.55],
        horizontal_spacing=0.2,
    )
    drawn = (before, "all rows", "#999999"), (without, f"without {len(fold['alone']['rows'])} rows", COLOURS[0])
    for margins, name, colour in drawn:
        right = float((margins > 0).double().mean())
        plot.add_histogram(
            x=margins.tolist(),
            histnorm="probability",
            nbinsx=40,
            opacity=0.55,
            marker_color=colour,
            name=f"{name}: right with {100 * right:.0f} % of the seeds",
            row=1,
            col=1,
        )
    plot.add_vline(0, line_dash="dot", row=1, col=1)
    for share, colour, symbol in zip(shares, COLOURS, SYMBOLS, strict=False):
        shown = [method for method in methods if f"{share:g} {method}" in results]
        found = [results[f"{share:g} {method}"]["flip rate"] for method in shown]
        plot.add_scatter(
            x=[100 * each[0] for each in found],
            y=[methods.index(method) + 0.3 * (shares.index(share) / max(1, len(shares) - 1) - 0.5) for method in shown],
            error_x={"array": [100 * (each[2] - each[0]) for each in found], "width": 0, "thickness": 1.5},
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9},
            name=f"{100 * share:g} % of the rows removed",
            row=1,
            col=2,
        )
    plot.add_vline(0, line_dash="dot", row=1, col=2)
    plot.update_xaxes(
        title_text=f"margin: right if above 0<br><br><span style='font-size:11px'>rows removed<br>{rows}</span>", col=1
    )
    plot.update_xaxes(title_text="change of the flip rate (percentage points; 95 % intervals)", col=2)
    plot.update_yaxes(title_text="share of the seeds", col=1)
    plot.update_yaxes(tickvals=list(range(len(methods))), ticktext=list(methods), autorange="reversed", col=2)
    legend = {"orientation": "h", "y": 1.3, "x": 0}
    return plot.update_layout(template="plotly_white", barmode="overlay", width=1200, height=600, legend=legend)
