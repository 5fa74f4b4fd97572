// The figures, drawn from columns of numbers in the colours of the page.

const TEMPLATE = document.getElementById("template").textContent;
const drawn = new Map(); // what each visible slot was drawn with, to draw it again in other colours

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ink: of("ink"), soft: of("soft"), faint: of("faint"), surface: of("surface"), muted: of("muted"),
    blue: of("blue"), vermillion: of("vermillion"), green: of("green") };
}

function draw(id, make) {
  const slot = document.getElementById(id);
  const colour = colours();
  const { data, layout } = make(colour);
  // the template of the package's figures, in the page's colours
  const template = JSON.parse(TEMPLATE.replaceAll("#1F2933", colour.ink).replaceAll("#E4E7EB", colour.faint)
    .replaceAll('"white"', `"${colour.surface}"`).replaceAll("#A6ADB8", colour.muted).replaceAll("#7B8794", colour.muted));
  drawn.set(id, make);
  slot.setAttribute("role", "group");
  slot.setAttribute("aria-label", layout.title.text);
  // titles break where the screen ends
  const lines = broken(layout.title.text, Math.max(20, Math.floor((slot.clientWidth - 30) / 8)));
  const title = { text: lines.join("<br>") }, margin = { t: 28 + 20 * lines.length };
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(min-width: 501px)").matches && "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  // a printed page does not wait for the figures to follow its width
  const width = document.documentElement.classList.contains("printing") ? slot.clientWidth : undefined;
  return Plotly.react(slot, data, { ...layout, title, margin, template, width, autosize: !width }, config);
}

// lines of at most a number of characters, where words allow it
function broken(text, most) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const line = lines.at(-1);
    if (line && line.length + word.length >= most) lines.push(word);
    else lines[lines.length - 1] = line ? `${line} ${word}` : word;
  }
  return lines;
}

const redraw = () => {
  for (const [id, make] of drawn) {
    if (document.getElementById(id).offsetParent) draw(id, make);
    else drawn.delete(id);
  }
};

// The measurement in every run, as trained and predicted without an example; a line joins the two values of a run.
function withoutFigure(query, at, name) {
  const { measurement, runs, range } = DATA;
  const trained = query.baseline;
  const predicted = trained.map((value, run) => value + query.changes[at][run]);
  const words = escaped(measurement);
  const without = `without ${DATA.noun} ${escaped(shortened(name, 24))}`;
  return (colour) => {
    const data = [
      ["falls", colour.blue, "solid", "circle", (run) => predicted[run] <= trained[run]],
      ["rises", colour.vermillion, "dash", "triangle-up", (run) => predicted[run] > trained[run]],
    ].map(([moves, color, dash, symbol, among]) => {
      const of = runs.map((_, run) => run).filter(among);
      return {
        type: "scatter", mode: "lines+markers", opacity: 0.8, connectgaps: false,
        x: of.flatMap(() => [0, 1, null]),
        y: of.flatMap((run) => [trained[run], predicted[run], null]),
        text: of.flatMap((run) => Array(3).fill(escaped(runs[run]))),
        line: { color, dash, width: 1.2 }, marker: { size: 6, symbol },
        name: `${counted(of.length, "run")}: ${moves}`, hovertemplate: "%{text}: %{y:.4g}<extra></extra>",
      };
    });
    if (runs.length > 1) {
      const both = [trained, predicted].map(moments);
      data.push({
        type: "scatter", mode: "markers", x: [-0.18, 1.18], y: both.map(([mean]) => mean),
        error_y: { array: both.map(([, spread]) => spread), color: colour.ink, thickness: 2, width: 8 },
        marker: { color: colour.ink, size: 10, symbol: "diamond" }, customdata: both.map(([, spread]) => spread),
        name: "mean ± standard deviation",
        hovertemplate: "mean %{y:.4g}, standard deviation %{customdata:.3g}<extra></extra>",
      });
    }
    const outside = (end, side) => known(end) && predicted.some((value) => (side < 0 ? value < end : value > end));
    const shapes = [[range[0], -1], [range[1], 1]].filter(([end, side]) => outside(end, side)).map(([end]) => (
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: end, y1: end, line: { dash: "dot", color: colour.ink } }));
    const annotations = [[range[0], -1, "below"], [range[1], 1, "above"]].filter(([end, side]) => outside(end, side))
      .map(([end, , side]) => ({ xref: "paper", x: 1, y: end, text: `the ${words} is never ${side} ${end}`,
        showarrow: false, yanchor: side === "below" ? "top" : "bottom" }));
    return {
      data,
      layout: {
        title: { text: `${escaped(capital(shortened(query.name, 24)))}, ${without}` },
        shapes, annotations,
        xaxis: { tickvals: [0, 1], ticktext: ["as trained<br>(X)", `${without}<br>(Y), predicted`], range: [-0.35, 1.35],
          zeroline: false, showgrid: false },
        yaxis: { title: { text: `${words} on the query` }, zeroline: false },
      },
    };
  };
}

// The mean influence of every example against its spread influence.
function pointsFigure(query) {
  const { position, mean, spread, significant } = query.points;
  const few = position.length < DATA.removals ? ` (${position.length} of ${DATA.removals})` : "";
  const words = escaped(DATA.measurement);
  const largest = (values) => values.map((value, at) => [Math.abs(value ?? 0), at]).sort((a, b) => b[0] - a[0])
    .slice(0, 3).map(([, at]) => at);
  const labelled = [...new Set([...largest(mean), ...largest(spread)])];
  return (colour) => ({
    data: [
      ["neither", colour.muted, "circle-open"], ["mean", colour.blue, "square"], ["spread", colour.vermillion, "diamond"],
      ["both", colour.green, "star"],
    ].map(([name, color, symbol], code) => {
      const of = position.map((_, at) => at).filter((at) => significant[at] === code);
      return {
        type: "scatter", mode: "markers", name: `${name} (${of.length})`, marker: { color, symbol, size: code ? 9 : 6 },
        x: of.map((at) => mean[at]), y: of.map((at) => spread[at]),
        customdata: of.map((at) => [escaped(nameOf(position[at])), position[at]]),
        hovertemplate: `<b>${DATA.noun} %{customdata[0]}</b><br>mean influence %{x:.3g}<br>spread influence %{y:.3g} %<extra></extra>`,
      };
    }).concat({
      type: "scatter", mode: "text", hoverinfo: "skip", showlegend: false, cliponaxis: false, textposition: "top right",
      x: labelled.map((at) => mean[at]), y: labelled.map((at) => spread[at]),
      text: labelled.map((at) => escaped(shortened(nameOf(position[at]), 16))),
    }),
    layout: {
      title: { text: `Every ${DATA.noun}${few}: ${escaped(shortened(query.name, 30))}` },
      xaxis: { title: { text: `change of the mean ${words}<br>if removed (E Y ${MINUS} E X)` } },
      yaxis: { title: { text: `change of the ${words}'s standard deviation<br>if removed (SD Y / SD X ${MINUS} 1, in %)` } },
      legend: { title: { text: "significant:" } },
    },
  });
}

// The distribution of each query's measurement over runs, those that depend most on the seed first.
function baselineFigure() {
  const MOST = 60;
  const order = DATA.queries.map((query, at) => [moments(query.baseline)[1] || 0, at]).sort((a, b) => b[0] - a[0]);
  const shown = order.slice(0, MOST).map(([, at]) => DATA.queries[at]);
  const few = shown.length < order.length ? `: the ${shown.length} least stable of ${order.length} queries` : "";
  const words = escaped(DATA.measurement);
  return (colour) => ({
    data: shown.map((query) => ({
      type: "box", y: query.baseline, name: escaped(shortened(query.name, 20)), text: DATA.runs.map(escaped), meta: query.id,
      boxpoints: "all", jitter: 0.5, pointpos: 0, marker: { color: colour.blue, size: 4, opacity: 0.6 },
      line: { color: colour.ink, width: 1 }, fillcolor: "rgba(0,114,178,0.12)", hoveron: "points",
      hovertemplate: "%{x}<br>%{text}: %{y:.4g}<extra></extra>",
    })),
    layout: {
      title: { text: `The ${words} as trained, over ${counted(DATA.runs.length, "run")}${few}` },
      xaxis: { title: { text: "query (those that depend most on the seed first)" }, type: "category" },
      yaxis: { title: { text: `${words} on the query` }, zeroline: false }, showlegend: false,
    },
  });
}

// Influence of the examples that are significant most often, on every query.
function heatFigure(number) {
  const MOST = 30;
  const { count, largest } = DATA.across[number], difference = DATA.differences[number];
  const top = count.map((_, at) => at)
    .sort((a, b) => count[b] - count[a] || Math.abs(largest[b]) - Math.abs(largest[a])).slice(0, MOST);
  const row = new Map(top.map((position, at) => [position, at]));
  const z = top.map(() => DATA.queries.map(() => null)), marks = top.map(() => DATA.queries.map(() => "")), said = marks.map((each) => [...each]);
  DATA.queries.forEach((query, column) => {
    const { rows } = query.ranked[number];
    rows.position.forEach((position, at) => {
      if (!row.has(position)) return;
      z[row.get(position)][column] = rows.influence[at];
      marks[row.get(position)][column] = rows.significant[at] ? "•" : "";
      said[row.get(position)][column] = rows.significant[at] ? "significant" : "may be seed noise";
    });
  });
  // the scale holds all but the largest hundredth, which would make the rest pale
  const sizes = z.flat().filter(known).map(Math.abs).sort((a, b) => a - b);
  const end = sizes[Math.floor(0.99 * (sizes.length - 1))] || 1;
  const many = DATA.queries.length > 40;
  return (colour) => ({
    data: [{
      type: "heatmap", z, customdata: said, text: marks, texttemplate: many ? "" : "%{text}", zmin: difference.signed ? -end : 0, zmax: end,
      x: DATA.queries.map((query) => escaped(shortened(query.name, 20))),
      y: top.map((position) => escaped(shortened(nameOf(position), 20))),
      colorscale: difference.signed ? [[0, colour.blue], [0.5, colour.surface], [1, colour.vermillion]]
        : [[0, colour.surface], [1, colour.blue]],
      xgap: many ? 0 : 1, ygap: 1, hoverongaps: false,
      colorbar: { title: { text: difference.relative ? "%" : "" }, thickness: 12, outlinewidth: 0 },
      hovertemplate: `${DATA.noun} %{y}, query %{x}<br>%{z:.3g}: %{customdata}<extra></extra>`,
    }],
    layout: {
      title: { text: `${escaped(capital(difference.title))} of the ${top.length} ${DATA.noun}s that matter most often${many ? "" : "; •: significant"}` },
      height: 180 + 18 * top.length,
      xaxis: { title: { text: "query" }, type: "category", showgrid: false, showticklabels: !many },
      yaxis: { title: { text: DATA.noun }, type: "category", autorange: "reversed", showgrid: false, dtick: 1 },
    },
  });
}

// How strongly a small change of the parameters at a step affects the measurement at the end.
function adjointFigure() {
  const lengths = DATA.adjoints.flatMap((curve) => curve.norms).filter((value) => value > 0);
  // over few decades, plotly would label a single tick
  const few = Math.max(...lengths) < 1e3 * Math.min(...lengths);
  const ticks = Array.from({ length: 57 }, (_, at) => [1, 2, 5][at % 3] * 10 ** (Math.floor(at / 3) - 9));
  const named = new Set();
  return (colour) => ({
    data: DATA.adjoints.map(({ run, chaotic, steps, norms }) => ({
      type: "scatter", mode: "lines", x: steps, y: norms, opacity: 0.8, legendgroup: String(chaotic),
      line: { color: chaotic ? colour.vermillion : colour.blue, width: chaotic ? 1.5 : 1, dash: chaotic ? "dash" : "solid" },
      name: chaotic ? "chaotic, left out" : "trusted", showlegend: !named.has(chaotic) && Boolean(named.add(chaotic)),
      hovertemplate: `${escaped(run)}, step %{x}: %{y:.3g}<extra></extra>`,
    })),
    layout: {
      title: { text: "Effect of a small change at step t" }, showlegend: DATA.adjoints.some((curve) => curve.chaotic),
      xaxis: { title: { text: "step t" }, zeroline: false },
      yaxis: { title: { text: "norm of the adjoint,<br>relative to the end" }, type: "log",
        ...(few ? { tickvals: ticks, ticktext: ticks.map(String) } : {}) },
    },
  });
}

// Predicted against retrained influence of the removals that were retrained, on one query.
function retrainedFigure(query, number) {
  const { subsets, differences } = DATA.retrained, difference = DATA.differences[number];
  const column = (key) => differences[number][key][query.position];
  const [x, y, low, high] = ["predicted", "retrained", "low", "high"].map(column);
  const ends = [...x, ...y, 0].filter(known), line = [Math.min(...ends), Math.max(...ends)];
  const percent = difference.relative ? " (%)" : "";
  return (colour) => ({
    data: [
      { type: "scatter", mode: "lines", x: line, y: line, line: { color: colour.soft, dash: "dot" }, hoverinfo: "skip",
        name: "predicted = retrained" },
      { type: "scatter", mode: "markers", x, y, text: subsets.map(escaped), name: "removals",
        marker: { color: colour.blue, size: 9 },
        error_y: { visible: low.some(known), symmetric: false, color: colour.soft, thickness: 1,
          array: y.map((value, at) => high[at] - value), arrayminus: y.map((value, at) => value - low[at]) },
        hovertemplate: "%{text}<br>predicted %{x:.3g}, retrained %{y:.3g}<extra></extra>" },
    ],
    layout: {
      title: { text: `${escaped(capital(difference.title))}, ${escaped(shortened(query.name, 30))}: predicted and retrained` },
      xaxis: { title: { text: `predicted: ${escaped(difference.short)}${percent}` } },
      yaxis: { title: { text: `retrained${percent}` } },
    },
  });
}

// mean and standard deviation
function moments(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return [mean, Math.sqrt(squares / (values.length - 1))];
}
