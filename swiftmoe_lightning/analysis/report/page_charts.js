// Drawing on SVG: elements, scales, axes, lines. A chart is cut into columns: column i holds steps first[i]..last[i].

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 7;
// Colours and dashes have no common period, so a pair repeats after 35 policies only.
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "5 2 1 2 1 2"];
const MARGIN = { left: 46, right: 10, top: 26, bottom: 38 };

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const colourOf = (index) => `var(--line-${index % COLOURS})`;
const dashOf = (index) => DASHES[index % DASHES.length];

// A short sample of a policy's line, for legends and tables.
function key(index) {
  const line = svg("line", { x1: 1, x2: 33, y1: 6, y2: 6, "stroke-width": 2.5, "stroke-dasharray": dashOf(index) });
  line.style.stroke = colourOf(index);
  return svg("svg", { class: "key", viewBox: "0 0 34 12", "aria-hidden": "true" }, line);
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = Math.max((high - low) / Math.max(count, 1), 1e-9);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// No more digits than the distance of two ticks needs.
function tickText(value, all) {
  const gap = all.length > 1 ? all[1] - all[0] : Math.abs(value) || 1;
  return value.toFixed(Math.max(0, -Math.floor(Math.log10(gap) + 1e-9)));
}

// Where a step lies, in columns; steps may be recorded at uneven distances.
function columnOf(step, columns) {
  const i = columns.last.findIndex((last) => last >= step);
  if (i < 0) return columns.last.length;
  const width = columns.last[i] - columns.first[i] + 1;
  return i + Math.min(Math.max((step - columns.first[i] + 0.5) / width, 0), 1);
}

function stepsText(columns, i) {
  const [first, last] = [columns.first[i], columns.last[i]];
  return first === last ? `step ${first}` : `steps ${first}–${last}`;
}

// Empties a figure but for its caption, and says how much room a plot has.
function clear(figure) {
  // Measured while the old plot is there: a page that is shorter for a moment would scroll.
  const width = Math.max(figure.clientWidth, 240);
  for (const old of figure.querySelectorAll(".plot, .readout")) old.remove();
  return width;
}

function stepAxis(picture, columns, box) {
  const [low, high] = [columns.first[0], columns.last[columns.last.length - 1]];
  const wanted = Math.max(2, Math.floor(box.width / 80));
  const marks = low === high ? [low] : ticks(low, high, wanted).filter(Number.isInteger);
  for (const step of marks) {
    const x = box.left + (columnOf(step, columns) / columns.last.length) * box.width;
    picture.append(svg("line", { class: "rule", x1: x, x2: x, y1: box.top + box.height, y2: box.top + box.height + 4 }));
    picture.append(svg("text", { x, y: box.top + box.height + 16, "text-anchor": "middle" }, `${step}`));
  }
  const middle = box.left + box.width / 2;
  picture.append(svg("text", { x: middle, y: box.top + box.height + 33, "text-anchor": "middle" }, "optimizer step"));
}

// A scale's ticks and title; `side` is "left" or "right". Only the left one rules lines across.
function valueAxis(picture, scale, box, side) {
  const marks = ticks(scale.low, scale.high, Math.max(2, Math.floor(box.height / 42)));
  const right = box.left + box.width;
  // An axis that does not begin at a round number says where it begins, if there is room.
  if (marks.length > 1 && marks[0] - scale.low > 0.4 * (marks[1] - marks[0])) marks.unshift(scale.low);
  for (const value of marks) {
    const y = heightOf(value, scale, box);
    if (side === "left") picture.append(svg("line", { class: "rule", x1: box.left, x2: right, y1: y, y2: y }));
    const x = side === "left" ? box.left - 6 : right + 6;
    const anchor = side === "left" ? "end" : "start";
    picture.append(svg("text", { x, y: y + 4, "text-anchor": anchor }, tickText(value, marks)));
  }
  const x = side === "left" ? 0 : box.left + box.width + box.right;
  const title = svg("text", { x, y: 12, "text-anchor": side === "left" ? "start" : "end" }, scale.title);
  if (scale.colour) title.style.fill = scale.colour;
  picture.append(title);
}

function heightOf(value, scale, box) {
  const share = (value - scale.low) / (scale.high - scale.low || 1);
  return box.top + box.height * (1 - Math.min(Math.max(share, 0), 1));
}

// The path of one line. As steps, each column is level, for what changes at once.
function pathOf(values, scale, box, asSteps) {
  const width = box.width / values.length;
  const points = [];
  values.forEach((value, i) => {
    const y = heightOf(value, scale, box).toFixed(1);
    const x = box.left + i * width;
    if (asSteps || values.length === 1) points.push(`${x.toFixed(1)} ${y}`, `${(x + width).toFixed(1)} ${y}`);
    else points.push(`${(x + width / 2).toFixed(1)} ${y}`);
  });
  return points;
}

function drawSeries(picture, series, box) {
  const points = pathOf(series.values, series.scale, box, series.asSteps);
  if (series.worst) {
    const back = pathOf(series.worst, series.scale, box, series.asSteps).reverse();
    const band = svg("path", { class: "band", d: `M${[...points, ...back].join("L")}Z` });
    band.style.fill = series.colour;
    picture.append(band);
  }
  const line = svg("path", { class: "line", d: `M${points.join("L")}`, "stroke-dasharray": series.dash || "" });
  line.style.stroke = series.colour;
  picture.append(line);
}

// Pointer and arrow keys choose a column; `show` gets its number and draws or writes what is there. The figure remembers
// the step, so that a chart that is drawn again shows it again.
function followColumns(figure, picture, box, columns, show) {
  const count = columns.last.length;
  let at = columns.last.findIndex((last) => last >= figure.step);
  const go = (i) => {
    at = Math.min(Math.max(i, 0), count - 1);
    figure.step = columns.first[at];
    show(at);
  };
  const shape = { class: "catch", x: box.left, y: box.top, width: box.width, height: box.height };
  const area = svg("rect", shape);
  area.addEventListener("pointermove", (event) => {
    const bounds = area.getBoundingClientRect();
    go(Math.floor(((event.clientX - bounds.left) / bounds.width) * count));
  });
  picture.append(area);
  picture.setAttribute("tabindex", "0");
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!move) return;
    event.preventDefault();
    go(at + move);
  });
  if (at >= 0) show(at);
}

// series: {name, values, worst, scale, colour, dash, asSteps, text(value, i)}; right: the second scale, if there is one.
function lineChart(figure, { columns, series, left, right, label, height = 220 }) {
  const width = clear(figure);
  const edge = right ? 46 : MARGIN.right;
  const box = { left: MARGIN.left, right: edge, top: MARGIN.top, height: height - MARGIN.top - MARGIN.bottom };
  box.width = width - box.left - box.right;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  valueAxis(picture, left, box, "left");
  if (right) valueAxis(picture, right, box, "right");
  stepAxis(picture, columns, box);
  for (const one of series) drawSeries(picture, one, box);

  const cursor = svg("line", { class: "cursor", y1: box.top, y2: box.top + box.height, visibility: "hidden" });
  picture.append(cursor);
  const hint = "Point at the chart, or focus it and press the arrow keys, to read values.";
  const readout = html("output", { class: "readout", "aria-live": "polite" }, hint);
  followColumns(figure, picture, box, columns, (i) => {
    const x = box.left + ((i + 0.5) / columns.last.length) * box.width;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
    cursor.setAttribute("visibility", "visible");
    const parts = series.flatMap((one) => [", ", `${one.name} `, html("b", {}, one.text(one.values[i], i))]);
    readout.replaceChildren(stepsText(columns, i), ...(parts.length ? [": ", ...parts.slice(1)] : []));
  });
  figure.append(html("div", { class: "plot" }, picture), readout);
}
