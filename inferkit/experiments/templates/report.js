// Draws each figure from the JSON beside it.
const drawsFast = Boolean(document.createElement("canvas").getContext("webgl"));
for (const place of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  if (!drawsFast) {
    for (const trace of data) if (trace.type === "scattergl") trace.type = "scatter";
  }
  Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false });
}
