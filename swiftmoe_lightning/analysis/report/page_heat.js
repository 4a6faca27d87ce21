// Heat maps: experts down, steps across, on a canvas below the SVG that holds the axes.

// matplotlib's cividis and viridis at 17 even places: both grow evenly lighter, and the colour-blind see the same order.
const CIVIDIS =
  "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838";
const VIRIDIS =
  "44015448186a472d7b4240863b528b33638d2c728e26828e21918c1fa08828ae803fbc735ec96284d44baddc30d8e219fde725";
const MAP_MARGIN = { left: 34, right: 8, top: 22, bottom: 38 };

// 0..1 -> red, green, blue.
function colourAt(map, share) {
  const places = map.length / 6 - 1;
  const at = Math.min(Math.max(share, 0), 1) * places;
  const from = Math.min(Math.floor(at), places - 1);
  const part = (place, channel) => parseInt(map.substr(place * 6 + channel * 2, 2), 16);
  return [0, 1, 2].map((c) => part(from, c) + (part(from + 1, c) - part(from, c)) * (at - from));
}

// values: [experts, columns] in one array. shade: value -> 0..1.
function paint(values, experts, shade, map) {
  const columns = values.length / experts;
  const canvas = html("canvas", { width: columns, height: experts, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, experts);
  const table = Array.from({ length: 256 }, (_, i) => colourAt(map, i / 255));
  values.forEach((value, i) => {
    const colour = table[Math.round(Math.min(Math.max(shade(value), 0), 1) * 255)];
    image.data.set([...colour, 255], i * 4);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

// Rows high enough to see, maps of many experts not endless.
const mapHeight = (experts) => Math.min(Math.max(experts * 13, 90), 340);

// options: columns, experts, values, shade, map, bar: {title, marks: [[value, text]]}, chosen, label, read(expert, i),
// choose(expert).
function heatMap(figure, options) {
  const { columns, experts, values } = options;
  const width = clear(figure);
  const box = { ...MAP_MARGIN, width: width - MAP_MARGIN.left - MAP_MARGIN.right, height: mapHeight(experts) };
  const total = box.top + box.height + box.bottom;
  const canvas = paint(values, experts, options.shade, options.map);
  placeCanvas(canvas, box);
  // A canvas that has to shrink is averaged by the browser; one that grows keeps its edges.
  if (canvas.width <= box.width) canvas.style.imageRendering = "pixelated";

  const picture = svg("svg", { viewBox: `0 0 ${width} ${total}`, height: total, role: "img", "aria-label": options.label });
  picture.append(svg("text", { x: 0, y: 12 }, "expert"));
  const row = box.height / experts;
  const marks = ticks(0, experts - 1, Math.max(1, Math.floor(box.height / 34))).filter(Number.isInteger);
  for (const expert of experts === 1 ? [0] : marks) {
    const y = box.top + (expert + 0.5) * row + 4;
    picture.append(svg("text", { x: box.left - 6, y, "text-anchor": "end" }, `${expert}`));
  }
  stepAxis(picture, columns, box);
  colourBar(picture, options, width);
  // Around the row, not on it: rows of many experts are thin.
  const top = box.top + options.chosen * row;
  const around = { x: box.left - 2, y: top - 2, width: box.width + 4, height: row + 4 };
  picture.append(svg("rect", { class: "rim", ...around }), svg("rect", { class: "frame", ...around }));

  const hint = "Point at the map to read values; click a row to choose its expert.";
  const readout = html("output", { class: "readout", "aria-live": "polite" }, hint);
  const show = (expert, i) => {
    const text = html("b", {}, options.read(expert, i));
    readout.replaceChildren(`expert ${expert}, ${stepsText(columns, i)}: `, text);
  };
  followColumns(figure, picture, box, columns, (i) => show(options.chosen, i));
  const area = picture.querySelector(".catch");
  const expertAt = (event) => {
    const bounds = area.getBoundingClientRect();
    const share = (event.clientY - bounds.top) / bounds.height;
    return Math.min(Math.max(Math.floor(share * experts), 0), experts - 1);
  };
  area.addEventListener("pointermove", (event) => {
    const bounds = area.getBoundingClientRect();
    const i = Math.floor(((event.clientX - bounds.left) / bounds.width) * columns.last.length);
    show(expertAt(event), Math.min(Math.max(i, 0), columns.last.length - 1));
  });
  area.addEventListener("click", (event) => options.choose(expertAt(event)));
  figure.append(html("div", { class: "plot" }, canvas, picture), readout);
}

function placeCanvas(canvas, box) {
  const place = { left: box.left, top: box.top, width: box.width, height: box.height };
  for (const [key, value] of Object.entries(place)) canvas.style[key] = `${value}px`;
}

// A strip of the colours at the top right, its marks above it.
function colourBar(picture, { map, shade, bar }, width) {
  const length = Math.min(170, width * 0.42);
  const left = width - MAP_MARGIN.right - length;
  const parts = 60;
  for (let i = 0; i < parts; i++) {
    const colour = colourAt(map, i / (parts - 1)).map(Math.round);
    // A little overlap hides the seams.
    const shape = { x: left + (i * length) / parts, y: 13, width: length / parts + 0.6, height: 6 };
    picture.append(svg("rect", { ...shape, fill: `rgb(${colour})` }));
  }
  let free = -Infinity;
  for (const [value, text] of bar.marks) {
    const x = left + Math.min(shade(value), 1) * length;
    if (x - free < 22) continue;
    free = x;
    picture.append(svg("text", { x, y: 9, "text-anchor": "middle" }, text));
  }
  picture.append(svg("text", { x: left - 12, y: 19, "text-anchor": "end" }, bar.title));
}
