// Draw every figure whose place is in the page.
// The buttons are named one by one because Plotly's default ones offer to send the chart to a web service.
const common = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ""};
const buttons = {modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
for (const [name, spec] of Object.entries(specs)) {
  const more = ["front", "runs"].includes(name) && innerWidth >= 560 ? buttons : {displayModeBar: false};
  Plotly.newPlot(name, spec.data, spec.layout, {...common, ...more});
}
// A narrow screen: the legend at the very bottom, where its rows lie over nothing, and no more marks than fit.
function narrow(name) {
  const {layout} = specs[name];
  const change = {"legend.yref": "container", "legend.y": 0, "legend.yanchor": "bottom", "margin.b": 215, "margin.l": 52, "margin.r": 8};
  if (layout.xaxis2) {
    const [low, high] = layout.xaxis2.range;
    const kept = [];
    layout.xaxis2.tickvals.forEach((at, i) => {
      if (!kept.length || at - layout.xaxis2.tickvals[kept[kept.length - 1]] > 0.13 * (high - low)) kept.push(i);
    });
    change["xaxis2.tickvals"] = kept.map((i) => layout.xaxis2.tickvals[i]);
    change["xaxis2.ticktext"] = kept.map((i) => layout.xaxis2.ticktext[i]);
  }
  Plotly.relayout(name, change);
}
if (innerWidth < 560) ["front", "runs"].filter((name) => specs[name]).forEach(narrow);
// On paper the page has one fixed width (see report.css), whatever the window's was.
const onPaper = {front: 1056, runs: 1056, comparison: 1056, sensitivity: 1056, hypervolume: 506, course: 506};
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
