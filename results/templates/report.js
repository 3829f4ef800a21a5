// Draw every figure whose place is in the page.
// The buttons are named one by one because Plotly's default ones offer to send the chart to a web service.
const common = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ""};
const buttons = {modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
for (const [name, spec] of Object.entries(specs)) {
  const more = name === "front" ? buttons : {displayModeBar: false};
  Plotly.newPlot(name, spec.data, spec.layout, {...common, ...more});
}
// A narrow screen has many rows of legend and little height: they would lie over the axis' title.
if (innerWidth < 560 && specs.front) Plotly.relayout("front", {"legend.y": -0.34, "margin.b": 150, "margin.l": 52, "margin.r": 8});
// On paper the page has one fixed width (see report.css), whatever the window's was.
const onPaper = {front: 1056, comparison: 1056, sensitivity: 1056, hypervolume: 506};
const drawn = Object.keys(specs);
window.addEventListener("beforeprint", () => drawn.forEach((name) => Plotly.relayout(name, {width: onPaper[name] || 1056})));
window.addEventListener("afterprint", () => drawn.forEach((name) => Plotly.relayout(name, {width: null, autosize: true})));
// A click on a column's head sorts by it: numbers by value, the rest as text; a second click turns the order round.
const number = (text) => parseFloat(text.replace(/\u2212/g, "-").replace(/[\u00b1,]/g, ""));
const key = (row, column) => row.cells[column].textContent.trim();
function sort(table, column, head) {
  const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
  const numeric = head.classList.contains("n");
  const order = (a, b) => {
    const [x, y] = [key(a, column), key(b, column)];
    if (!numeric) return down * x.localeCompare(y, undefined, {numeric: true});
    const [p, q] = [number(x), number(y)];
    return Number.isNaN(p) || Number.isNaN(q) ? Number.isNaN(p) - Number.isNaN(q) : down * (p - q);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}
document.querySelectorAll("table.sortable").forEach((table) => [...table.tHead.rows[0].cells].forEach((head, column) => {
  head.tabIndex = 0;
  head.addEventListener("click", () => sort(table, column, head));
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort(table, column, head));
}));
