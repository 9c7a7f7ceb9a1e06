"use strict";
const make = (parent, name, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
};
const tip = (node, text) => make(node, "title", {}, text);
const show = value => value.toFixed(4);
const color = i => `var(--run-${i % 8})`;

// Axes of a plot whose y runs from 0 to top.
const frame = (svg, width, height, top, ticks) => {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const left = 48, right = width - 12, bottom = height - 24, head = 12;
  const y = value => bottom - (bottom - head) * value / (top || 1);
  for (let i = 0; i <= ticks; i++) {
    const value = top * i / ticks;
    make(svg, "line", {x1: left, x2: right, y1: y(value), y2: y(value), stroke: "var(--line)"});
    make(svg, "text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, value ? value.toPrecision(2) : "0");
  }
  return {left, right, bottom, head, y};
};

// Plain and stored error of every layer, in the model's order.
const drawLayers = (svg, layers) => {
  const top = 1.08 * Math.max(...layers.map(l => Math.max(l.error_plain, l.error)));
  const {left, right, bottom, y} = frame(svg, 960, 280, top, 4);
  const step = (right - left) / layers.length, radius = Math.max(1.5, Math.min(4, step / 3));
  layers.forEach((l, i) => {
    const x = left + step * (i + 0.5), group = make(svg, "g", {});
    tip(group, `${l.name}: ${show(l.error_plain)} -> ${show(l.error)}`);
    make(group, "rect", {x: x - step / 2, y: 12, width: step, height: bottom - 12, fill: "transparent"});
    make(group, "line", {x1: x, x2: x, y1: y(l.error_plain), y2: y(l.error), stroke: "var(--line)"});
    make(group, "circle", {cx: x, cy: y(l.error_plain), r: radius, fill: "var(--plain)"});
    make(group, "circle", {cx: x, cy: y(l.error), r: radius, fill: "var(--solved)"});
  });
  make(svg, "text", {x: left, y: bottom + 16}, layers[0].name);
  make(svg, "text", {x: right, y: bottom + 16, "text-anchor": "end"}, layers[layers.length - 1].name);
};

// Error of each block (rows) and kind of module (columns); least and most fix the scale, so that maps compare.
const drawHeat = (svg, layers, least, most, width = 960) => {
  const place = name => {
    const match = /^(.*?\.)(\d+)\.(.*)$/.exec(name);
    return match ? [match[1] + match[2], match[3]] : ["-", name];
  };
  const rows = [...new Set(layers.map(l => place(l.name)[0]))], columns = [...new Set(layers.map(l => place(l.name)[1]))];
  const cell = Math.max(12, Math.min(20, 600 / rows.length));
  const left = 150, wide = (width - left - 12) / columns.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${cell * rows.length + 40}`);
  const letter = width < 700 ? 8 : 6.5; // pixels at the style's font sizes
  columns.forEach((name, i) => {
    const short = name.length * letter > wide ? "\u2026" + name.slice(-Math.max(2, Math.floor(wide / letter) - 1)) : name;
    tip(make(svg, "text", {x: left + wide * (i + 0.5), y: 20, "text-anchor": "middle"}, short), name);
  });
  rows.forEach((name, i) => make(svg, "text", {x: left - 8, y: 30 + cell * (i + 0.75), "text-anchor": "end"}, name));
  for (const l of layers) {
    const [row, column] = place(l.name), share = most > least ? (l.error - least) / (most - least) : 0.5;
    const rect = make(svg, "rect", {x: left + wide * columns.indexOf(column) + 1, y: 30 + cell * rows.indexOf(row) + 1,
      width: wide - 2, height: cell - 2, rx: 2,
      style: `fill: color-mix(in srgb, rgb(var(--high)) ${Math.round(100 * share)}%, rgb(var(--low)))`});
    tip(rect, `${l.name}: ${show(l.error)}`);
  }
};

const relativeTraces = layers => layers.filter(l => l.trace.length > 1 && l.trace[0] > 0).map(l => l.trace.map(v => v / l.trace[0]));
const quantile = (traces, i, q) => {
  const all = traces.map(t => t[Math.min(i, t.length - 1)]).sort((a, b) => a - b);
  return all[Math.round(q * (all.length - 1))];
};

// Objective by iteration, relative to its start: the median of each set of traces; of a single set the spread, too.
const drawIterations = (svg, sets, stroke = color) => {
  const count = Math.max(...sets.flat().map(t => t.length)), steps = [...Array(count).keys()];
  const top = 1.05 * Math.max(...sets.filter(traces => traces.length).flatMap(traces => steps.map(i => quantile(traces, i, 0.9))));
  const {left, right, bottom, y} = frame(svg, 960, 240, top, 4);
  const x = i => left + (right - left) * i / (count - 1);
  sets.forEach((traces, number) => {
    if (!traces.length) return;
    const line = q => steps.map(i => `${x(i)},${y(quantile(traces, i, q))}`);
    if (sets.length === 1) make(svg, "polygon", {points: [...line(0.9), ...line(0.1).reverse()].join(" "), fill: "var(--band)"});
    make(svg, "polyline", {points: line(0.5).join(" "), fill: "none", stroke: stroke(number), "stroke-width": 2});
    steps.forEach(i => tip(make(svg, "circle", {cx: x(i), cy: y(quantile(traces, i, 0.5)), r: 4, fill: stroke(number)}),
      `iteration ${i}: ${show(quantile(traces, i, 0.5))}`));
  });
  steps.forEach(i => make(svg, "text", {x: x(i), y: bottom + 16, "text-anchor": i ? (i === count - 1 ? "end" : "middle") : "start"}, i));
};

const makeSortable = table => {
  const body = table.querySelector("tbody"), heads = [...table.querySelectorAll("th")];
  const key = (row, column) => { const cell = row.cells[column]; return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent; };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a, column), key(b, column))));
  }));
};

const makeCopyable = (button, source) => {
  if (button) button.addEventListener("click", () => navigator.clipboard.writeText(source.textContent)
    .then(() => { button.textContent = "copied"; }));
};
