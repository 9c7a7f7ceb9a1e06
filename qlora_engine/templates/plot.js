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
const LETTER = 6.6; // pixels of a letter at the style's font size

// Plots are as wide as their place and drawn in its pixels, so that text is as large on a phone as on a desk.
const room = svg => Math.max(300, Math.floor(svg.parentElement.clientWidth) || 960);
const sized = (svg, width, height) => { svg.replaceChildren(); svg.setAttribute("viewBox", `0 0 ${width} ${height}`); };

// The end of a name, where the whole of it does not fit.
const fit = (name, pixels) => name.length * LETTER <= pixels ? name : "\u2026" + name.slice(-Math.max(2, Math.floor(pixels / LETTER) - 1));

// Round numbers between from and to: steps of 1, 2, 2.5 or 5 times a power of ten.
const ticks = (from, to, count) => {
  const raw = (to - from) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find(m => m * power >= 0.999 * raw), found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to * (1 + 1e-9); i++) found.push(Number((i * step).toPrecision(6)));
  return found;
};

// Axes of a plot whose y runs from 0 to top.
const frame = (svg, height, top, title) => {
  const width = room(svg), marks = ticks(0, top, 4);
  sized(svg, width, height);
  const left = 12 + LETTER * Math.max(...marks.map(m => String(m).length)), right = width - 12, bottom = height - 24, head = title ? 24 : 12;
  const y = value => bottom - (bottom - head) * value / (top || 1);
  for (const value of marks) {
    make(svg, "line", {x1: left, x2: right, y1: y(value), y2: y(value), stroke: "var(--line)"});
    make(svg, "text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, String(value));
  }
  if (title) make(svg, "text", {x: 8, y: 14}, title);
  return {left, right, bottom, head, width, y};
};

// Plain and stored error of every layer, in the model's order.
const drawLayers = (svg, layers) => {
  const top = 1.08 * Math.max(...layers.map(l => Math.max(l.error_plain, l.error)));
  const {left, right, bottom, y} = frame(svg, 280, top);
  const step = (right - left) / layers.length, radius = Math.max(1.5, Math.min(4, step / 3));
  layers.forEach((l, i) => {
    const x = left + step * (i + 0.5), group = make(svg, "g", {});
    tip(group, `${l.name}: ${show(l.error_plain)} -> ${show(l.error)}`);
    make(group, "rect", {x: x - step / 2, y: 12, width: step, height: bottom - 12, fill: "transparent"});
    make(group, "line", {x1: x, x2: x, y1: y(l.error_plain), y2: y(l.error), stroke: "var(--line)"});
    make(group, "circle", {cx: x, cy: y(l.error_plain), r: radius, fill: "var(--plain)"});
    make(group, "circle", {cx: x, cy: y(l.error), r: radius, fill: "var(--solved)"});
  });
  const half = (right - left) / 2 - 8;
  make(svg, "text", {x: left, y: bottom + 16}, fit(layers[0].name, half));
  if (layers.length > 1) make(svg, "text", {x: right, y: bottom + 16, "text-anchor": "end"}, fit(layers[layers.length - 1].name, half));
};

const shade = share => `fill: color-mix(in srgb, rgb(var(--high)) ${Math.round(100 * share)}%, rgb(var(--low)))`;

// A value of each block (rows) and kind of module (columns); least and most fix the scale, so that maps compare.
const drawHeat = (svg, layers, value, least, most, write = show) => {
  const place = name => {
    const match = /^(.*?\.)(\d+)\.(.*)$/.exec(name);
    return match ? [match[1] + match[2], match[3]] : ["", name];
  };
  const rows = [...new Set(layers.map(l => place(l.name)[0]))], columns = [...new Set(layers.map(l => place(l.name)[1]))];
  const prefixes = [...new Set(rows.filter(r => r).map(r => r.replace(/\d+$/, "")))];
  const title = row => prefixes.length === 1 ? row.slice(prefixes[0].length) : row;
  const width = room(svg), cell = Math.max(12, Math.min(20, 600 / rows.length));
  const left = 14 + Math.min(0.3 * width, LETTER * Math.max(...rows.map(r => title(r).length)));
  const longest = LETTER * Math.max(...columns.map(c => c.length));
  const slanted = longest > (width - left - 12) / columns.length;
  const head = slanted ? Math.min(130, 0.87 * longest) + 16 : 30, right = slanted ? Math.min(70, 0.5 * longest) : 12;
  const wide = (width - left - right) / columns.length, bottom = head + cell * rows.length;
  sized(svg, width, bottom + 34);
  if (prefixes.length === 1) make(svg, "text", {x: 8, y: slanted ? 16 : head - 10}, slanted ? prefixes[0] : "");
  columns.forEach((name, i) => {
    const x = left + wide * (i + 0.5), turn = slanted ? {transform: `rotate(-60 ${x} ${head - 6})`} : {"text-anchor": "middle"};
    tip(make(svg, "text", {x, y: head - (slanted ? 6 : 10), ...turn}, fit(name, slanted ? 142 : wide)), name);
  });
  rows.forEach((name, i) => make(svg, "text", {x: left - 8, y: head + cell * (i + 0.5) + 4, "text-anchor": "end"}, fit(title(name), left - 12)));
  for (const l of layers) {
    if (value(l) === null) continue;
    const [row, column] = place(l.name), share = most > least ? (value(l) - least) / (most - least) : 0.5;
    const rect = make(svg, "rect", {x: left + wide * columns.indexOf(column) + 1, y: head + cell * rows.indexOf(row) + 1,
      width: Math.max(1, wide - 2), height: cell - 2, rx: 2, style: shade(share)});
    tip(rect, `${l.name}: ${write(value(l))}`);
  }
  for (let i = 0; i < 5; i++) make(svg, "rect", {x: left + 52 + 18 * i, y: bottom + 10, width: 17, height: 11, style: shade(i / 4)});
  make(svg, "text", {x: left + 46, y: bottom + 20, "text-anchor": "end"}, write(least));
  make(svg, "text", {x: left + 148, y: bottom + 20}, write(most));
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
  const {left, right, bottom, y} = frame(svg, 240, top);
  const x = i => left + (right - left) * i / (count - 1);
  sets.forEach((traces, number) => {
    if (!traces.length) return;
    const own = steps.slice(0, Math.max(...traces.map(t => t.length)));
    const line = q => own.map(i => `${x(i)},${y(quantile(traces, i, q))}`);
    if (sets.length === 1) make(svg, "polygon", {points: [...line(0.9), ...line(0.1).reverse()].join(" "), fill: "var(--band)"});
    make(svg, "polyline", {points: line(0.5).join(" "), fill: "none", stroke: stroke(number), "stroke-width": 2});
    own.forEach(i => tip(make(svg, "circle", {cx: x(i), cy: y(quantile(traces, i, 0.5)), r: 4, fill: stroke(number)}),
      `iteration ${i}: ${show(quantile(traces, i, 0.5))}`));
  });
  steps.forEach(i => make(svg, "text", {x: x(i), y: bottom + 16, "text-anchor": i ? (i === count - 1 ? "end" : "middle") : "start"}, i));
};

// A titled plot of its own in a grid of plots.
const panel = (parent, title) => {
  const box = document.createElement("div"), head = document.createElement("h3");
  head.textContent = title;
  box.append(head);
  document.getElementById(parent).append(box);
  return make(box, "svg", {role: "img", "aria-label": title});
};

// Draw now, and again when the page's width changes.
const drawn = draw => {
  let width = innerWidth;
  draw();
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
};

const makeSortable = table => {
  const body = table.querySelector("tbody"), heads = [...table.querySelectorAll("th")];
  const key = (row, column) => { const cell = row.cells[column]; return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent; };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); head.click(); } });
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a, column), key(b, column))));
    });
  });
};

const makeFilter = (input, table) => input.addEventListener("input", () => {
  const wanted = input.value.toLowerCase();
  for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
});

const makeCopyable = (button, source) => {
  if (button) button.addEventListener("click", () => navigator.clipboard.writeText(source.textContent)
    .then(() => { button.textContent = "copied"; }));
};
