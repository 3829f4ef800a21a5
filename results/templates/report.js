// Draw every figure whose place is in the page.
// The buttons are named one by one because Plotly's default ones offer to send the chart to a web service.
const common = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ""};
const buttons = {modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
for (const [name, spec] of Object.entries(specs)) {
  const more = name === "front" ? buttons : {displayModeBar: false};
  Plotly.newPlot(name, spec.data, spec.layout, {...common, ...more});
}
// On paper the page has one fixed width (see report.css), whatever the window's was.
const onPaper = {front: 1056, comparison: 1056, hypervolume: 506};
const drawn = Object.keys(specs);
window.addEventListener("beforeprint", () => drawn.forEach((name) => Plotly.relayout(name, {width: onPaper[name]})));
window.addEventListener("afterprint", () => drawn.forEach((name) => Plotly.relayout(name, {width: null, autosize: true})));
