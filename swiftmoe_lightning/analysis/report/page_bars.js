// Horizontal bars: what each policy sends a step, and what it lost to what.

const SENT = ["gradients", "weights", "paper's way", "state moved"];
const BAR = { label: 92, value: 76, row: 18, gap: 12 };

function bytesText(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 999.5) return `${Number(value.toPrecision(3))} ${unit}`;
    value /= 1000;
  }
  return `${Number(value.toPrecision(4))} TB`;
}

// A recorded run does not say what it sent.
const isCounted = (policy) => policy.sent.some((value) => value !== null);

// One unit for a whole axis, so that its ticks are round in it.
function byteScale(most) {
  const power = Math.min(Math.max(Math.floor(Math.log10(Math.max(most, 1)) / 3), 0), 4);
  return { size: 1000 ** power, unit: ["B", "kB", "MB", "GB", "TB"][power] };
}

function bottomAxis(picture, { left, width, y, top, title }) {
  const marks = ticks(0, top, Math.max(2, Math.floor(width / 70)));
  for (const value of marks) {
    const x = left + (value / top) * width;
    picture.prepend(svg("line", { class: "rule", x1: x, x2: x, y1: 0, y2: y }));
    picture.append(svg("text", { x, y: y + 14, "text-anchor": "middle" }, tickText(value, marks)));
  }
  picture.append(svg("text", { x: left + width / 2, y: y + 31, "text-anchor": "middle" }, title));
}

function byteBars(figure, policies) {
  const width = clear(figure);
  const known = policies.filter(isCounted);
  if (!known.length) return;
  const most = Math.max(...known.flatMap((policy) => policy.sent.map((value) => value ?? 0)), 1);
  const room = width - BAR.label - BAR.value;
  const label = `Bytes sent a step: ${known.map((policy) => policy.name).join(", ")}`;
  const picture = svg("svg", { role: "img", "aria-label": label });
  let y = 0;
  for (const policy of known) {
    const colour = colourOf(policies.indexOf(policy));
    picture.append(svg("text", { class: "strong", x: 0, y: y + 13 }, policy.name));
    y += BAR.row;
    policy.sent.forEach((value, i) => {
      picture.append(svg("text", { x: BAR.label - 8, y: y + 13, "text-anchor": "end" }, SENT[i]));
      const length = value === null ? 0 : Math.max((value / most) * room, value > 0 ? 1 : 0);
      const bar = svg("rect", { x: BAR.label, y: y + 3, width: length, height: BAR.row - 6 });
      bar.style.fill = colour;
      // Not sent, only compared with.
      if (i === 2) bar.style.opacity = 0.45;
      const text = value === null ? "not counted" : bytesText(value);
      picture.append(bar, svg("text", { x: BAR.label + length + 6, y: y + 13 }, text));
      y += BAR.row;
    });
    y += BAR.gap;
  }
  const { size, unit } = byteScale(most);
  bottomAxis(picture, { left: BAR.label, width: room, y, top: most / size, title: `${unit} a step, all ranks` });
  finish(figure, picture, width, y + 36);
}

// Hatches of the loss terms: told apart by the drawn lines, not by colour alone.
const HATCHES = ["", "M0 8L8 0", "M0 0L8 8", "M4 0V8", "M0 4H8", "M0 8L8 0M0 0L8 8", "M4 0V8M0 4H8"];

function hatches() {
  const patterns = HATCHES.map((d, i) => {
    const ground = svg("rect", { width: 8, height: 8 });
    ground.style.fill = colourOf(i);
    const lines = svg("path", { d, "stroke-width": 1.4 });
    lines.style.stroke = "var(--paper)";
    return svg("pattern", { id: `hatch-${i}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" }, ground, lines);
  });
  return svg("svg", { width: 0, height: 0, class: "hidden", "aria-hidden": "true" }, svg("defs", {}, ...patterns));
}

const hatchOf = (index) => `url(#hatch-${index % HATCHES.length})`;

function hatchKey(index) {
  const sample = svg("rect", { width: 24, height: 12, fill: hatchOf(index) });
  return svg("svg", { class: "key", viewBox: "0 0 34 12", "aria-hidden": "true" }, sample);
}

function lossBars(figure, { policies, lossTerms, dropless }) {
  const width = clear(figure);
  const judged = policies.filter((policy) => policy.losses);
  if (!judged.length) return;
  // What a term gained back cannot be stacked; the table has its number.
  const parts = judged.map((policy) => policy.losses.map((loss) => 100 * Math.max(loss, 0)));
  const sums = parts.map((row) => row.reduce((sum, part) => sum + part, 0));
  const most = Math.max(...sums, 1e-6);
  const room = width - BAR.value;
  const label = `What was lost: ${judged.map((policy, i) => `${policy.name} ${sums[i].toFixed(2)} %`).join(", ")}`;
  const picture = svg("svg", { role: "img", "aria-label": label });
  let y = 0;
  judged.forEach((policy, row) => {
    picture.append(svg("text", { class: "strong", x: 0, y: y + 13 }, policy.name));
    let x = 0;
    const texts = [];
    parts[row].forEach((part, term) => {
      const length = (part / most) * room;
      const shape = { x, y: y + 19, width: length, height: 20, fill: hatchOf(term) };
      picture.append(svg("rect", shape, svg("title", {}, `${lossTerms[term]} ${part.toFixed(2)} %`)));
      const text = `${lossTerms[term]} ${part.toFixed(1)} %`;
      if (text.length * 7 + 8 < length) {
        const room = text.length * 7;
        const middle = x + length / 2;
        // A hatch is no ground to read on.
        texts.push(svg("rect", { class: "ground", x: middle - room / 2, y: y + 21, width: room, height: 16 }));
        texts.push(svg("text", { x: middle, y: y + 33, "text-anchor": "middle" }, text));
      }
      x += length;
    });
    picture.append(...texts, svg("text", { x: x + 6, y: y + 33 }, `${sums[row].toFixed(2)} %`));
    y += 46;
  });
  const title = dropless ? "busiest rank's load over the mean, % above it" : "% of assignments dropped";
  bottomAxis(picture, { left: 0, width: room, y, top: most, title });
  finish(figure, picture, width, y + 36);
}

function finish(figure, picture, width, height) {
  picture.setAttribute("viewBox", `-8 0 ${width} ${height}`);
  picture.setAttribute("height", height);
  figure.append(html("div", { class: "plot" }, picture));
}
