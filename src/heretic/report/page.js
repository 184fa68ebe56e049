"use strict";
// Draws the figures that the page brings along, in the colors of the page, and follows its controls.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const narrow = matchMedia("(max-width: 40rem)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = {};
  for (const [name, choice] of Object.entries(content.choices)) chosen[name] = choice.selected;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(layout) {
    const ink = color("--ink"), line = color("--line");
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: narrow.matches ? 11 : 13 },
      margin: { l: narrow.matches ? 45 : 60, r: narrow.matches ? 15 : 30, t: 30, b: 50 },
            modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
      hoverlabel: { bgcolor: color("--paper"), bordercolor: line, font: { color: ink } },
      ...structuredClone(layout),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", ...layout.legend },
    };
    for (const key of new Set([...Object.keys(whole), "xaxis", "yaxis"])) {
      if (/^[xy]axis/.test(key)) whole[key] = { automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, ...whole[key] };
    }
    return whole;
  }

  function draw(name) {
    const { variants, choice } = content.figures[name];
    const place = document.getElementById("figure-" + name);
    const figure = variants[choice ? chosen[choice] : 0];
    place.classList.toggle("empty", !figure);
    if (!figure) {
      Plotly.purge(place);
      place.textContent = "Nothing is stored that could be drawn here.";
      return;
    }
    if (!place.data) place.textContent = "";
    Plotly.react(place, structuredClone(figure.data), themed(figure.layout), {
      responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
      // Named one by one: among plotly's own is one that sends the chart away, and a policy does not stop that.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
      plotlyServerURL: "", showSendToCloud: false,
    });
  }

  function drawAll() {
    for (const name of Object.keys(content.figures)) draw(name);
  }

  function choose(choice, index) {
    chosen[choice] = index;
    for (const control of document.querySelectorAll(`[data-choice="${choice}"]`)) control.value = index;
    for (const label of document.querySelectorAll(`[data-label="${choice}"]`)) {
      label.textContent = content.choices[choice].labels[index];
    }
    for (const block of document.querySelectorAll(`[data-block="${choice}"]`)) {
      block.hidden = Number(block.dataset.index) !== index;
    }
    for (const [name, figure] of Object.entries(content.figures)) if (figure.choice === choice) draw(name);
  }

  drawAll();
  for (const control of document.querySelectorAll("[data-choice]")) {
    control.addEventListener("input", () => choose(control.dataset.choice, Number(control.value)));
  }
  for (const [name, choice] of Object.entries(content.choices)) choose(name, choice.selected);
  const front = document.getElementById("figure-front");
  if (front && front.on && content.choices.trial) {
    front.on("plotly_click", (event) => {
      const index = content.choices.trial.numbers.indexOf(event.points[0].customdata);
      if (index >= 0) choose("trial", index);
    });
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = "yes";
})();
