// One page, three views of the same findings. The address holds the state, so links and the back button keep it:
// #view=query&q=4&d=mean&e=155

let DATA;
const $ = (id) => document.getElementById(id);
// from the middle: names often begin alike
const shortened = (text, most) => (text.length > most ? `${text.slice(0, Math.floor(most / 3))}…${text.slice(1 + Math.floor(most / 3) - most)}` : text);
const nameOf = (position) => DATA.names?.[position] ?? DATA.examples[position]?.name ?? String(position);
const SIGNIFICANT = "✓ significant", NOISE = "~ may be seed noise";
let state = {}, rendered = {};

function address(changes = {}) {
  const { view, query, difference, example } = { ...state, ...changes };
  const parts = { view, q: query.id, d: difference.key, e: example };
  if ("query" in changes && !("example" in changes)) delete parts.e; // its own first example
  return `#${new URLSearchParams(Object.entries(parts).filter(([, value]) => value !== null && value !== undefined))}`;
}

function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const views = [...document.querySelectorAll(".views [data-view]")].map((link) => link.dataset.view);
  const example = asked.has("e") ? Number(asked.get("e")) : null;
  return {
    view: views.includes(asked.get("view")) ? asked.get("view") : "query",
    query: DATA.queries.find((query) => String(query.id) === asked.get("q")) ?? DATA.queries[DATA.first],
    difference: DATA.differences.find((each) => each.key === asked.get("d")) ?? DATA.differences[0],
    example: Number.isInteger(example) && example >= 0 && example < DATA.removals ? example : null,
  };
}

const number = () => DATA.differences.indexOf(state.difference);
const ranked = () => state.query.ranked[number()];
const chosen = () => state.example ?? ranked().rows.position[0];

function render() {
  state = read();
  for (const link of document.querySelectorAll(".views [data-view]")) {
    link.setAttribute("aria-current", link.dataset.view === state.view ? "page" : "false");
    $(`view-${link.dataset.view}`).hidden = link.dataset.view !== state.view;
  }
  for (const link of document.querySelectorAll("a[data-view]")) link.href = address({ view: link.dataset.view });
  for (const link of document.querySelectorAll(".differences a")) {
    const difference = DATA.differences.find((each) => each.key === link.dataset.difference);
    link.href = address({ difference });
    link.setAttribute("aria-current", String(difference === state.difference));
  }
  document.querySelector(".differences").hidden = state.view === "suggestion";
  VIEWS[state.view]();
  rendered = state;
}

const VIEWS = {
  query() {
    const { query, difference } = state;
    $("query").value = query.id;
    const at = DATA.queries.indexOf(query);
    $("previous").disabled = at === 0;
    $("next").disabled = at === DATA.queries.length - 1;
    $("asked").replaceChildren(
      element("h2", {}, capital(query.name)), ...shownParts(query.shown),
      element("p", {}, element("strong", {}, "As trained: "), query.trained));
    $("cards-title").textContent = difference.question;
    cards();
    $("said").textContent = ranked().verdict;
    if (rendered.query !== query || rendered.difference !== difference || rendered.view !== state.view) queryTable();
    else markChosen();
    showChosen();
    $("points-panel").hidden = !query.points;
    if (query.points) draw("points", pointsFigure(query)).then((slot) => onPoint(slot, (point) => point.customdata?.[1]));
  },

  queries() {
    if (rendered.view === "queries" && rendered.difference === state.difference) return;
    const rows = DATA.queries.map((query) => ({
      id: query.id, name: query.name, label: query.shown.label ?? "", trained: query.value,
      spread: moments(query.baseline)[1], ...Object.fromEntries(query.ranked.map((each, n) => [`found${n}`, each.found])),
      largest: query.ranked[number()].rows.influence[0], significant: query.ranked.some((each) => each.found > 0),
      words: [query.name, query.id, query.shown.label, query.shown.text, query.shown.prediction].join(" ").toLowerCase(),
    }));
    table("queries-table", [
      { field: "name", title: "query", formatter: (cell) => pick(cell.getValue(), address({ view: "query",
        query: DATA.queries.find((query) => query.id === cell.getData().id) })) },
      ...(rows.some((row) => row.label) ? [{ field: "label", title: "label", formatter: text }] : []),
      numeric("spread", `${DATA.measurement} as trained`, (row) => row.trained, "sorted by the standard deviation over runs"),
      ...DATA.differences.map((each, n) => numeric(`found${n}`, `significant: ${each.name}`, (row) => String(row[`found${n}`]))),
      numeric("largest", `largest ${state.difference.title}`, (row) => amount(row.largest)),
    ], rows, { csv: "queries.csv", search: "Search queries by name, label or text", filter: "only with significant influences",
      listed: `${counted(rows.length, "query", "queries")}; choose one to see its ${DATA.noun}s.` });
    draw("baseline", baselineFigure()).then((slot) => {
      slot.removeAllListeners("plotly_click");
      slot.on("plotly_click", ({ points: [point] }) => {
        location.hash = address({ view: "query", query: DATA.queries.find((query) => query.id === point.data.meta) });
      });
    });
  },

  examples() {
    if (rendered.view === "examples" && rendered.difference === state.difference) return;
    const { count, largest, where } = DATA.across[number()];
    const byPosition = new Map(DATA.queries.map((query) => [query.position, query]));
    const rows = count.map((_, position) => {
      const query = byPosition.get(where[position]), shown = DATA.examples[position] ?? {};
      return {
        id: position, name: nameOf(position), label: shown.label ?? "", count: count[position], largest: largest[position],
        query, where: query?.name ?? "", significant: count[position] > 0, words: words(position),
      };
    });
    table("examples-table", [
      { field: "name", title: DATA.noun, sorter: DATA.names ? "string" : (a, b, one, other) => one.getData().id - other.getData().id,
        formatter: (cell) => {
          const { id, query } = cell.getData();
          return query ? pick(cell.getValue(), address({ view: "query", query, example: id })) : text(cell);
        } },
      ...(rows.some((row) => row.label) ? [{ field: "label", title: "label", formatter: text }] : []),
      numeric("count", "queries on which it is significant", (row) => String(row.count)),
      numeric("largest", `largest ${state.difference.title}`, (row) => amount(row.largest), state.difference.meaning),
      { field: "where", title: "on query", formatter: text },
    ], rows, { csv: `${DATA.noun}s.csv`, search: `Search ${DATA.noun}s by name, label or text`, filter: "only significant",
      sort: [{ column: "largest", dir: "desc" }, { column: "count", dir: "desc" }],
      listed: `${capital(state.difference.title)}, ${state.difference.formula}. All ${counted(rows.length, DATA.noun)}; a link leads to the query with the largest influence.` });
    draw("heat", heatFigure(number())).then((slot) => {
      slot.removeAllListeners("plotly_click");
      slot.on("plotly_click", ({ points: [point] }) => {
        const query = DATA.queries[point.pointIndex[1]];
        const example = rows.find((row) => escaped(shortened(row.name, 20)) === point.y)?.id;
        location.hash = address({ view: "query", query, example });
      });
    });
  },

  retrained() {
    const { subsets, differences } = DATA.retrained, of = differences[number()];
    const there = Object.keys(of).length > 0;
    $("retrained").hidden = !there;
    $("retrained-table").hidden = !there;
    if (!there) return;
    draw("retrained", retrainedFigure(state.query, number()));
    const rows = DATA.queries.flatMap((query) => subsets.map((name, at) => ({
      id: `${query.id}-${at}`, query: query.name, name, predicted: of.predicted[query.position][at],
      influence: of.retrained[query.position][at], low: of.low[query.position][at], high: of.high[query.position][at],
      words: `${name} ${query.name}`.toLowerCase(), link: query,
    })));
    table("retrained-table", [
      { field: "query", title: "query", formatter: (cell) => pick(cell.getValue(), address({ query: cell.getData().link })) },
      { field: "name", title: "removed", formatter: text },
      numeric("predicted", "predicted", (row) => amount(row.predicted)),
      numeric("influence", "retrained", (row) => amount(row.influence, row.low, row.high)),
      numeric("low", "95 % interval", (row) => interval(row)),
    ], rows, { csv: "retrained.csv", search: "Search removals and queries", listed: state.difference.meaning });
  },

  suggestion() {
    $("suggested").replaceChildren(...DATA.suggestion.map((each) => card(each.name, each.examples, each.effect, null)));
  },
};

function queryTable() {
  const { query, difference } = state, { rows } = ranked();
  const percent = difference.relative ? ", %" : "";
  const ends = [...rows.low, ...rows.high, ...rows.influence, 0].filter(known);
  const [least, most] = [ends.reduce((a, b) => Math.min(a, b), Infinity), ends.reduce((a, b) => Math.max(a, b), -Infinity)];
  const list = rows.position.map((position, at) => {
    const of = Object.fromEntries(Object.entries(rows).map(([name, values]) => [name, values[at]]));
    return {
      ...of, id: position, name: nameOf(position), label: DATA.examples[position]?.label ?? "", size: DATA.sizes?.[position],
      significant: of.significant === 1, words: words(position), chosen: position === chosen(),
    };
  });
  const all = list.length === DATA.removals;
  const made = table("table", [
    numeric("rank", "rank", (row) => String(row.rank)),
    { field: "name", title: DATA.noun, sorter: DATA.names ? "string" : (a, b, one, other) => one.getData().id - other.getData().id,
      formatter: (cell) => {
        const { id, outside } = cell.getData();
        const link = pick(cell.getValue(), address({ example: id }));
        if (!outside) return link;
        const hint = `without it, the ${DATA.measurement} is predicted where it cannot be, in ${Math.round(100 * outside)} % of the runs`;
        return element("span", {}, link, element("abbr", { title: hint }, "†"));
      } },
    { field: "significant", title: "real?", formatter: (cell) => element("span", { class: "real" }, cell.getValue() ? "✓ yes" : "~ unclear") },
    ...(DATA.sizes ? [numeric("size", "examples", (row) => String(row.size))] : []),
    ...(list.some((row) => row.label) ? [{ field: "label", title: "label", formatter: text }] : []),
    numeric("influence", `influence${percent}`, (row) => supported(row.influence, row.low, row.high)[0], difference.meaning),
    ...(difference.noInterval ? [] : [
      { ...numeric("low", `${Math.round(100 * DATA.level)} % interval${percent}`, (row) => interval(row), "over seeds"), download: true },
      { field: "high", title: "interval, upper end", visible: false, download: true },
      { field: "influence", title: "plot", headerSort: false, download: false, minWidth: 122, width: 122, formatter: (cell) => whisker(cell.getData(), least, most) }]),
    numeric("p", "p", (row) => pValue(row.p), "p-value of no effect"),
    numeric("q", "q", (row) => pValue(row.q), `smallest false discovery rate at which it is significant among all ${DATA.removals}`),
    ...(difference.planned ? [
      numeric("fewest", "retrainings", (row) => counts(row.fewest, row.most), "without and with it, to confirm the effect"),
      { field: "most", title: "retrainings, at most", visible: false, download: true }] : []),
    ...(difference.name === "mean" ? [] : [numeric("mean", "mean influence", (row) => plain(row.mean), "E Y − E X")]),
    ...(difference.name === "spread" ? [] : [numeric("spread", "spread influence, %", (row) => plain(row.spread), "SD Y / SD X − 1")]),
  ], list, { csv: `query-${query.id}-${difference.key}.csv`, search: `Search ${DATA.noun}s by name, label or text`, filter: "only significant",
    listed: `${capital(difference.title)}, ${difference.formula}: ${difference.meaning}; in ${difference.unit}. ${difference.reading} `
      + (all ? `All ${counted(list.length, DATA.noun)} are listed.`
        : `${list.length.toLocaleString("en")} of ${counted(DATA.removals, DATA.noun)} are listed: the largest, and significant ones.`)
      + (difference.noInterval ? ` No interval is shown: ${difference.noInterval}` : "") });
  if (state.example !== null) made.on("tableBuilt", markChosen);
}

function markChosen() {
  const made = tables.get("table");
  for (const row of made.getRows()) {
    row.getData().chosen = row.getData().id === chosen();
    row.getElement().classList.toggle("chosen", row.getData().chosen);
  }
  const row = made.getRow(chosen());
  // drawn again, the page would lose the keyboard's place; a row that a filter hides is on no page
  if (row && !row.getElement().isConnected) made.setPageToRow(row).catch(() => {});
}

// the chosen example, and the runs without it
function showChosen() {
  const { query, difference } = state, { rows } = ranked();
  const position = chosen(), at = rows.position.indexOf(position), drawnAt = query.listed.indexOf(position);
  const examples = DATA.members?.[position] ?? [position];
  $("chosen").replaceChildren(
    element("div", { class: "chosen-title" }, element("h2", {}, titleOf(position)), at < 0 ? null : badge(rows.significant[at] === 1),
      at < 0 ? null : element("p", {}, `${amount(rows.influence[at], rows.low[at], rows.high[at])} `
        + (known(rows.low[at]) ? `[${interval({ influence: rows.influence[at], low: rows.low[at], high: rows.high[at] })}]` : ""))),
    at < 0 ? element("p", { class: "soft" }, `Not listed for this query: its ${difference.title} is small.`) : "",
    ...examples.flatMap((index) => shownParts(DATA.examples[index] ?? {})));
  $("without").hidden = drawnAt < 0;
  if (drawnAt >= 0) draw("without", withoutFigure(query, drawnAt, nameOf(position)));
}

function titleOf(position) {
  const size = DATA.sizes ? ` (${counted(DATA.sizes[position], "example")})` : "";
  const title = DATA.names || DATA.examples[position]?.name ? nameOf(position) : `${DATA.noun} ${position}`;
  return capital(shortened(title, 60)) + size;
}

const badge = (significant) => element("p", { class: significant ? "badge real" : "badge noise" }, significant ? SIGNIFICANT : NOISE);

function cards() {
  const { rows, effects } = ranked();
  $("cards").replaceChildren(...effects.map((effect, at) => {
    const position = rows.position[at];
    return card(titleOf(position), DATA.members?.[position] ?? [position], effect, rows.significant[at] === 1, position);
  }));
}

// an example, or some of a group, with what happens without it
function card(title, examples, effect, significant, position = null) {
  const head = position === null ? element("h3", {}, capital(title))
    : element("h3", {}, element("a", { href: address({ example: position }), "aria-current": String(position === chosen()) }, title));
  return element("li", { class: `panel card${position !== null && position === chosen() ? " chosen" : ""}` }, head,
    significant === null ? null : badge(significant),
    effect ? element("p", { class: "effect" }, effect) : null,
    ...examples.flatMap((index) => shownParts(DATA.examples[index] ?? {})));
}

// the parts of an example or a query that it has
function shownParts({ image, text: words, label, prediction, fields = [], name }) {
  const told = [["Label", label, "told"], ["Prediction", prediction, "told"]].filter(([, value]) => value);
  return [
    image ? element("img", { src: image, alt: `picture of ${name ?? label ?? "it"}` }) : null,
    words ? element("blockquote", {}, words) : null,
    told.length + fields.length ? element("dl", { class: "fields" }, ...[...told, ...fields].map(([term, value, kind]) =>
      element("div", { class: kind }, element("dt", {}, term), element("dd", {}, value)))) : null,
  ].filter(Boolean);
}

const text = (cell) => element("span", {}, String(cell.getValue() ?? ""));
const pick = (name, href) => element("a", { class: "pick", href }, String(name));
const amount = (value, low = null, high = null) => supported(value, low, high)[0] + (state.difference.relative ? `${NO_BREAK}%` : "");
const interval = (row) => {
  const [, low, high] = supported(row.influence, row.low, row.high);
  return known(row.low) ? `${low} to ${high}` : UNKNOWN;
};
const words = (position) => {
  const { name, label, text: said } = DATA.examples[position] ?? {};
  return [position, nameOf(position), name, label, said].join(" ").toLowerCase();
};

function onPoint(slot, positionOf) {
  slot.removeAllListeners("plotly_click");
  slot.on("plotly_click", ({ points: [point] }) => {
    const example = positionOf(point);
    if (example !== undefined) location.hash = address({ example });
  });
}

function copyable(button) {
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
      $("status").textContent = "Copied";
    } catch { // not allowed in this browser: select it, to be copied by hand
      getSelection().selectAllChildren(command);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

async function start() {
  DATA = await unpacked("data");
  for (const query of DATA.queries) $("query").append(element("option", { value: query.id }, query.name));
  for (const difference of DATA.differences) {
    document.querySelector(".differences").append(
      element("a", { "data-difference": difference.key }, capital(difference.title)));
  }
  $("query").addEventListener("change", (event) => {
    location.hash = address({ query: DATA.queries.find((query) => String(query.id) === event.target.value) });
  });
  const go = (by) => () => { location.hash = address({ query: DATA.queries[DATA.queries.indexOf(state.query) + by] }); };
  $("previous").addEventListener("click", go(-1));
  $("next").addEventListener("click", go(1));
  document.querySelectorAll(".copy").forEach(copyable);
  $("diagnostics").addEventListener("toggle", () => { if ($("adjoint")) draw("adjoint", adjointFigure()); });
  addEventListener("hashchange", render);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); redraw(); });
  addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); redraw(); });
  render();
  document.documentElement.dataset.ready = "";
}

start();
