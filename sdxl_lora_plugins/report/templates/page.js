"use strict";
(() => {
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const charts = new Map(JSON.parse(document.getElementById("charts").textContent).map(c => [c.id, c]));
  const drawn = new Map();

  function draw(box) {
    const chart = charts.get(box.dataset.chart);
    const data = uPlot.join(chart.curves.map(curve => [curve.x, curve.y]));
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const number = value => value == null ? "" : Number(value.toPrecision(4)).toString();
    const plot = new uPlot({
      width: box.clientWidth, height: 240,
      scales: { x: { time: false } },
      axes: [axis, { ...axis, size: 64, values: (_, ticks) => ticks.map(number) }],
      series: [{ label: "step" }, ...chart.curves.map((curve, index) => ({
        label: curve.label, stroke: colour("--c" + (curve.colour ?? index) % 8), width: curve.faint ? 1 : 2,
        alpha: curve.faint ? 0.35 : 1, spanGaps: true, points: { show: curve.x.length < 30, fill: colour("--panel") },
        value: (_, value) => number(value),
      }))],
    }, data, box);
    drawn.get(box)?.destroy();
    drawn.set(box, plot);
  }

  const boxes = document.querySelectorAll("[data-chart]");
  boxes.forEach(draw);
  const resized = new ResizeObserver(entries => entries.forEach(({ target }) => {
    const plot = drawn.get(target);
    if (plot && plot.width !== target.clientWidth) plot.setSize({ width: target.clientWidth, height: 240 });
  }));
  boxes.forEach(box => resized.observe(box));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => boxes.forEach(draw));

  document.querySelectorAll("[data-samples]").forEach(part => {
    const slider = part.querySelector("input[type=range]");
    const steps = JSON.parse(slider.dataset.steps);
    const rows = [...part.querySelectorAll(".stage")];
    // The small pictures of the grid are the large ones again, so that each is in the file once.
    part.querySelectorAll("tbody tr").forEach((row, index) => row.querySelectorAll("[data-cell]").forEach(cell => {
      const large = rows[index].querySelector(`[data-at="${cell.dataset.cell}"] img`);
      if (!large) { cell.textContent = "none"; return; }
      const small = new Image();
      small.src = large.src;
      small.alt = "";
      cell.append(small);
    }));
    function show() {
      part.querySelector("[data-step]").textContent = steps[slider.value];
      slider.setAttribute("aria-valuetext", "step " + steps[slider.value]);
      part.querySelectorAll("[data-at]").forEach(one => { one.hidden = one.dataset.at !== slider.value; });
      part.querySelectorAll("[data-cell]").forEach(cell => cell.classList.toggle("now", cell.dataset.cell === slider.value));
    }
    slider.addEventListener("input", show);
    part.querySelectorAll("[data-go]").forEach(button => button.addEventListener("click", () => { slider.value = button.dataset.go; show(); }));
    show();
  });

  document.querySelectorAll("[data-copy]").forEach(button => button.addEventListener("click", () => {
    const text = button.parentElement.querySelector("[data-command]");
    getSelection().selectAllChildren(text);
    const copied = navigator.clipboard ? navigator.clipboard.writeText(text.textContent) : Promise.reject();
    copied.then(() => { button.textContent = "Copied"; }, () => { button.textContent = "Selected"; });
  }));
})();
