// Searchable, sortable tables of Tabulator, with links in place of clicks, so that the keyboard reaches everything.

const tables = new Map();

function table(id, columns, rows, { csv, search, filter = null, listed, sort = [] }) {
  const container = document.getElementById(id);
  tables.get(id)?.destroy();
  const input = element("input", { type: "search", placeholder: search, "aria-label": search });
  const only = filter && element("input", { type: "checkbox" });
  const shown = element("span", { class: "soft", role: "status" });
  const download = element("button", { type: "button" }, "Download CSV");
  const body = element("div"), pages = element("div", { class: "pages" });
  container.replaceChildren(
    element("div", { class: "tools" }, input, filter && element("label", {}, only, ` ${filter}`), download, shown),
    element("p", { class: "soft" }, listed), body, pages);
  const made = new Tabulator(body, {
    data: rows, columns: columns.map(headed), layout: "fitDataTable", pagination: true, paginationSize: 10, paginationElement: pages,
    paginationSizeSelector: [10, 25, 100], initialSort: sort, headerSortClickElement: "header", columnHeaderSortMulti: false,
    // Tabulator's own way draws rows again when they come into view, and takes the focus from the link that led there
    autoResize: false,
    placeholder: "Nothing is found.", movableColumns: false, index: "id",
    rowFormatter: (row) => {
      const { significant, chosen } = row.getData();
      row.getElement().classList.toggle("unclear", significant === false);
      row.getElement().classList.toggle("chosen", Boolean(chosen));
    },
  });
  const apply = () => {
    const wanted = input.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    made.setFilter((row) => (!only?.checked || row.significant) && wanted.every((word) => row.words.includes(word)));
  };
  input.addEventListener("input", apply);
  only?.addEventListener("change", apply);
  download.addEventListener("click", () => made.download("csv", csv, { bom: true }));
  made.on("dataFiltered", (_, found) => { shown.textContent = `${counted(found.length, "row")}`; });
  made.on("renderComplete", () => named(container));
  body.addEventListener("keydown", (event) => step(body, event));
  tables.set(id, made);
  return made;
}

addEventListener("resize", () => {
  for (const made of tables.values()) if (made.initialized && made.element.offsetParent) made.redraw();
});

// the head of a column as a button: Tabulator's own heads are out of the keyboard's reach
function headed({ title, hint, ...column }) {
  return {
    accessorDownload: harmless, headerWordWrap: true, headerHozAlign: column.hozAlign ?? "left", vertAlign: "middle", ...column, title,
    titleFormatter: () => element("button", { type: "button", class: "head", title: hint }, title),
  };
}

// a name that a spreadsheet would take for a formula
function harmless(value) {
  return typeof value === "string" && /^[=+@\t\r-]/.test(value) ? `'${value}` : value;
}

// what Tabulator leaves without a name, or with a role that its content contradicts
function named(container) {
  const holder = container.querySelector(".tabulator-tableholder");
  holder?.removeAttribute("tabindex"); // its links are in the keyboard's reach
  holder?.setAttribute("role", "presentation");
  container.querySelector(".tabulator-page-size")?.setAttribute("aria-label", "Rows a page");
}

// arrow keys move between the links of neighbouring rows
function step(body, event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by || !event.target.matches("a.pick")) return;
  const links = [...body.querySelectorAll("a.pick")];
  const next = links[links.indexOf(event.target) + by];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

// an element, as Tabulator parses strings as HTML
const numeric = (field, title, format, hint) => (
  { field, title, hint, sorter: smaller, hozAlign: "right", formatter: (cell) => element("span", {}, format(cell.getData())) });

// unknown numbers last, whichever way the column is sorted
function smaller(a, b, rowA, rowB, column, direction) {
  if (known(a) && known(b)) return a - b;
  return (known(a) ? -1 : known(b) ? 1 : 0) * (direction === "desc" ? -1 : 1);
}

// an interval and its estimate on an axis that all rows share
function whisker(row, least, most) {
  const WIDTH = 110, HEIGHT = 16, SVG = "http://www.w3.org/2000/svg";
  const x = (value) => (4 + (WIDTH - 8) * (Math.min(Math.max(value, least), most) - least) / (most - least || 1)).toFixed(1);
  const part = (tag, attributes) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const svg = part("svg", { width: WIDTH, height: HEIGHT, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true", class: "whisker" });
  svg.append(part("line", { x1: x(0), x2: x(0), y1: 0, y2: HEIGHT, class: "zero" }));
  if (known(row.low)) svg.append(part("line", { x1: x(row.low), x2: x(row.high), y1: HEIGHT / 2, y2: HEIGHT / 2 }));
  svg.append(row.significant ? part("circle", { cx: x(row.influence), cy: HEIGHT / 2, r: 4 })
    : part("circle", { cx: x(row.influence), cy: HEIGHT / 2, r: 3.5, class: "open" }));
  return svg;
}
