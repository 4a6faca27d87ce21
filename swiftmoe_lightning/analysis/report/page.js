// The page itself: reads the data, fills the controls, and draws every chart again when a choice or the width changes.

const at = (id) => document.getElementById(id);
const chosen = (id) => Number(at(id).value);

let data, lines, maps, policies, experts;
function read() {
  data = JSON.parse(at("data").textContent);
  ({ lines, maps, policies, experts } = data);
}

// Whole numbers of 1 or 2 bytes in base64 -> values. Once for each series: it is cut into rows later.
const unpacked = new WeakMap();
function unpack(packed) {
  if (!unpacked.has(packed)) {
    const bytes = atob(packed.data);
    const values = new Float32Array(bytes.length / packed.bytes);
    for (let i = 0; i < values.length; i++) {
      let whole = bytes.charCodeAt(i * packed.bytes);
      if (packed.bytes === 2) whole += 256 * bytes.charCodeAt(i * 2 + 1);
      values[i] = packed.low + whole * packed.unit;
    }
    unpacked.set(packed, values);
  }
  return unpacked.get(packed);
}

// Rows from..from+count-1 of a table as wide as its columns.
function rows(packed, columns, from, count = 1) {
  const width = columns.last.length;
  return unpack(packed).subarray(from * width, (from + count) * width);
}

function fill(id, names) {
  at(id).append(...names.map(([value, text]) => html("option", { value }, text)));
}

// What an averaged chart does not show, said below it.
function averaged(columns, what) {
  return columns.widest > 1 ? `Each ${what} is the mean of up to ${columns.widest} recorded steps. ` : "";
}

function drawLines() {
  if (!policies.length) return;
  const layer = chosen("line-layer");
  const shown = [...at("line-policies").querySelectorAll("input")].map((box) => box.checked);
  const where = layer === 0 ? "all layers" : data.layers[layer - 1];
  const seriesOf = (table, scale, factor, text) =>
    policies.flatMap((policy, i) => {
      if (!shown[i]) return [];
      const [values, worst] = [table[i].mean, table[i].worst].map((packed) => rows(packed, lines, layer).map((x) => factor * x));
      const read = (value, column) => text(value, worst[column]);
      return [{ name: policy.name, values, worst, scale, colour: colourOf(i), dash: dashOf(i), text: read }];
    });
  // The scale fits the lines of all policies, shown or not, so that it keeps still; bands may leave the chart.
  const extreme = (table, choose) => choose(1, ...table.map((one) => choose(...rows(one.mean, lines, layer))));

  at("survival").hidden = data.dropless;
  if (!data.dropless) {
    const low = Math.floor(Math.min(extreme(lines.survival, Math.min), 0.98) * 20) * 5;
    const left = { low, high: 100, title: "assignments computed, %" };
    const text = (mean, worst) => `${mean.toFixed(1)} % (worst ${worst.toFixed(1)})`;
    const series = seriesOf(lines.survival, left, 100, text);
    lineChart(at("survival"), { columns: lines, series, left, label: `Token survival over steps, ${where}` });
  }
  const high = 1 + 1.08 * Math.max(extreme(lines.imbalance, Math.max) - 1, 0.05);
  const left = { low: 1, high, title: "busiest rank's load / mean load" };
  const text = (mean, worst) => `${mean.toFixed(2)} (worst ${worst.toFixed(2)})`;
  const series = seriesOf(lines.imbalance, left, 1, text);
  lineChart(at("imbalance"), { columns: lines, series, left, label: `Imbalance over steps, ${where}` });
  const band = layer === 0 ? "Bands reach to the worst layer" : "Bands reach to the worst step";
  at("line-note").textContent = `${averaged(lines, "point")}${band}.`;
}

function drawMaps() {
  const [layer, policy, expert] = ["map-layer", "map-policy", "map-expert"].map(chosen);
  const name = data.layers[maps.layers[layer]];
  const choose = (next) => {
    at("map-expert").value = next;
    drawMaps();
  };
  const common = { columns: maps, experts, chosen: expert, choose };
  const width = maps.last.length;
  const popularity = rows(maps.popularity, maps, layer * experts, experts);
  // The root's scale keeps both a collapsed router's peaks and small differences in sight.
  const shade = (value) => Math.sqrt(value / maps.brightest);
  const powers = Array.from({ length: 12 }, (_, i) => 2 ** i).filter((value) => value <= maps.brightest);
  heatMap(at("popularity"), {
    ...common,
    values: popularity,
    shade,
    map: CIVIDIS,
    bar: { title: "1 = balanced:", marks: [[0, "0"], ...powers.map((value) => [value, `${value}`])] },
    label: `Popularity of each expert over steps, ${name}`,
    read: (one, i) => `${popularity[one * width + i].toFixed(2)} x balanced`,
  });
  const packed = policies.length ? maps.replicas[policy] : null;
  at("replicas").hidden = !packed;
  const replicas = packed && rows(packed, maps, layer * experts, experts);
  if (packed) drawReplicas(common, packed, replicas, name, policies[policy].name);
  drawExpert({ popularity, replicas, packed, expert, policy, name });
  const cut = maps.layers.length < data.layers.length;
  const some = cut ? `${maps.layers.length} of ${data.layers.length} layers can be chosen. ` : "";
  const tied = packed ? "Where the two lines meet, replicas are in proportion to popularity." : "";
  at("map-note").textContent = averaged(maps, "column") + some + tied;
}

function replicasText(value) {
  return value.toFixed(Math.abs(value - Math.round(value)) < 0.02 ? 0 : 1);
}

function drawReplicas(common, packed, replicas, layerName, policyName) {
  const width = maps.last.length;
  const marks = ticks(0, packed.most, 4).filter(Number.isInteger);
  heatMap(at("replicas"), {
    ...common,
    values: replicas,
    shade: (value) => value / packed.most,
    map: VIRIDIS,
    bar: { title: "replicas:", marks: marks.map((value) => [value, `${value}`]) },
    label: `Replicas of each expert over steps, ${layerName}, ${policyName}`,
    read: (one, i) => `${replicasText(replicas[one * width + i])} replicas`,
  });
}

// One expert as the paper's Figures 9 and 10 show it. The scales are tied: where the lines meet, the expert's share of
// the slots is its share of the popularity.
function drawExpert({ popularity, replicas, packed, expert, policy, name }) {
  const width = maps.last.length;
  const cut = (values) => values.slice(expert * width, (expert + 1) * width);
  const share = cut(popularity).map((value) => (100 * value) / experts);
  const counts = replicas && cut(replicas);
  const slots = packed ? packed.slots : 1;
  const high = Math.max(...share, ...(counts ? counts.map((count) => (100 * count) / slots) : []), 1) * 1.05;
  const left = { low: 0, high, title: "popularity, % of assignments", colour: colourOf(0) };
  const read = (value) => `${value.toFixed(2)} %`;
  const series = [{ name: "popularity", values: share, scale: left, colour: colourOf(0), text: read }];
  let right;
  if (counts) {
    right = { low: 0, high: (high * slots) / 100, title: `replicas (of ${slots} slots)`, colour: colourOf(1) };
    const text = replicasText;
    series.push({ name: "replicas", values: counts, scale: right, colour: colourOf(1), dash: "6 3", asSteps: true, text });
  }
  const what = `Expert ${expert} of ${name}` + (counts ? ` with ${policies[policy].name}` : "");
  const caption = at("expert").querySelector("figcaption");
  caption.replaceChildren(`${what}: popularity`);
  if (counts) caption.append(" (solid) and replicas (dashed)");
  lineChart(at("expert"), { columns: maps, series, left, right, label: caption.textContent });
}

function drawAll() {
  const focused = document.activeElement?.closest("figure");
  at("over-time").hidden = !policies.length;
  at("losses").closest("section").hidden = !policies.some((policy) => policy.losses);
  at("sent").closest("section").hidden = !policies.some(isCounted);
  drawLines();
  drawMaps();
  lossBars(at("losses"), data);
  byteBars(at("sent"), policies);
  focused?.querySelector("svg[tabindex]")?.focus({ preventScroll: true });
}

// The samples of lines and hatches in the tables.
function drawKeys() {
  for (const cell of document.querySelectorAll("[data-policy], [data-loss]")) {
    const { policy, loss } = cell.dataset;
    if (!cell.querySelector(".key")) cell.prepend(loss === undefined ? key(Number(policy)) : hatchKey(Number(loss)));
  }
}

// The expert to begin with: the first layer's most popular one, all steps together.
function mostPopular() {
  const sums = Array.from({ length: experts }, (_, i) => rows(maps.popularity, maps, i).reduce((sum, x) => sum + x, 0));
  return sums.indexOf(Math.max(...sums));
}

function start() {
  read();
  document.body.append(hatches());
  fill("line-layer", [[0, "all"], ...data.layers.map((name, i) => [i + 1, name])]);
  fill("map-layer", maps.layers.map((layer, i) => [i, data.layers[layer]]));
  fill("map-policy", policies.flatMap((policy, i) => (maps.replicas[i] ? [[i, policy.name]] : [])));
  fill("map-expert", Array.from({ length: experts }, (_, i) => [i, `${i}`]));
  at("map-expert").value = mostPopular();
  // One is no choice.
  at("map-policy").parentElement.hidden = at("map-policy").options.length < 2;
  at("line-policies").hidden = policies.length < 2;
  policies.forEach((policy, i) => {
    const box = html("input", { type: "checkbox", checked: "" });
    at("line-policies").append(html("label", {}, box, key(i), policy.name));
  });
  drawKeys();

  for (const id of ["line-layer", "line-policies"]) at(id).addEventListener("change", drawLines);
  for (const id of ["map-layer", "map-policy", "map-expert"]) at(id).addEventListener("change", drawMaps);
  let width = 0;
  new ResizeObserver(() => {
    // Redrawing changes the height; only a new width needs it.
    if (document.querySelector("main").clientWidth === width) return;
    width = document.querySelector("main").clientWidth;
    requestAnimationFrame(drawAll);
  }).observe(document.querySelector("main"));
}

start();
