// Drawing on canvases in the page's colours: sparklines, stacked bars, the block map, the timeline.

const PITCHES = [22, 20, 18, 16, 14, 12, 10, 8, 7, 6];
const MAP_HEIGHT = 216;

const cache = new Map();
let probe = null;

/** The colour of a custom property as the browser resolves it now. */
export function colour(name) {
  if (!cache.has(name)) {
    probe ??= document.body.appendChild(Object.assign(document.createElement("i"), { hidden: true }));
    probe.style.color = `var(--${name})`;
    cache.set(name, getComputedStyle(probe).color);
  }
  return cache.get(name);
}

/** After a change of theme. */
export const forgetColours = () => cache.clear();

/** The canvas's context in CSS pixels, cleared, with the size it has on the page; null while it is not shown. */
export function prepare(canvas, height = canvas.clientHeight) {
  const width = canvas.clientWidth;
  if (!width || !height) return null;
  const ratio = Math.min(devicePixelRatio || 1, 3);
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  if (canvas.style.height !== `${height}px` && height !== canvas.clientHeight) canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** A line with a soft area under it; `most` is the value at the top. */
export function sparkline(canvas, values, most, tint) {
  const area = prepare(canvas);
  if (!area || values.length < 2) return;
  const { context, width, height } = area;
  const top = most || Math.max(...values) || 1;
  const x = (index) => (index / (values.length - 1)) * width;
  const y = (value) => height - 2 - (Math.min(value, top) / top) * (height - 6);
  context.beginPath();
  values.forEach((value, index) => context.lineTo(x(index), y(value)));
  context.strokeStyle = tint;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(0, height);
  context.globalAlpha = 0.1;
  context.fillStyle = tint;
  context.fill();
  context.globalAlpha = 1;
}

/** A round number, at least `value`. */
export function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value);
}

/** Bars of stacked parts, newest at the right, with three labelled lines. */
export function stackedBars(canvas, columns, tints, most, unit) {
  const area = prepare(canvas);
  if (!area) return;
  const { context, width, height } = area;
  const left = 44;
  const bottom = height - 4;
  const scale = (bottom - 10) / most;
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const part of [0, 0.5, 1]) {
    const y = Math.round(bottom - most * part * scale) + 0.5;
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(left, y);
    context.lineTo(width, y);
    context.stroke();
    context.fillStyle = colour("soft");
    context.fillText(part ? `${+(most * part).toPrecision(3)} ${unit}` : "0", left - 8, Math.min(y, height - 6));
  }
  const step = (width - left) / Math.max(columns.length, 60);
  const gap = step > 4 ? 1 : 0;
  columns.forEach((parts, index) => {
    const x = width - (columns.length - index) * step;
    let y = bottom;
    parts.forEach((value, part) => {
      const tall = Math.min(value * scale, y - 4);
      context.fillStyle = tints[part];
      context.fillRect(x, y - tall, step - gap, tall);
      y -= tall;
    });
  });
}

/** A cell per block (or per few blocks), as large as they fit; gives the geometry for pointing at one. */
export function blockMap(canvas, cells, tintOf) {
  const width = canvas.clientWidth;
  if (!width || !cells.length) return null;
  const tall = (one) => Math.ceil(cells.length / Math.floor(width / one)) * one;
  const pitch = PITCHES.find((one) => tall(one) <= MAP_HEIGHT) ?? PITCHES.at(-1);
  const gap = pitch > 9 ? 2 : 1;
  const columns = Math.max(1, Math.floor((width + gap) / pitch));
  const rows = Math.ceil(cells.length / columns);
  const area = prepare(canvas, rows * pitch - gap);
  if (!area) return null;
  const { context } = area;
  const round = pitch > 12 ? 3 : pitch > 9 ? 2 : 1;
  // One path per tint: thousands of cells in a dozen fills.
  const paths = new Map();
  cells.forEach((cell, index) => {
    const tint = tintOf(cell);
    let path = paths.get(tint);
    if (!path) paths.set(tint, (path = new Path2D()));
    path.roundRect((index % columns) * pitch, Math.floor(index / columns) * pitch, pitch - gap, pitch - gap, round);
  });
  for (const [tint, path] of paths) {
    context.fillStyle = tint;
    context.fill(path);
  }
  return { columns, pitch };
}

/** Requests as bars over the last `span` seconds, `now` at the right edge. */
export function timeline(canvas, bars, lanes, now, span) {
  const thick = lanes <= 12 ? 16 : lanes <= 24 ? 10 : 5;
  const gap = thick > 8 ? 5 : 2;
  const axis = 20;
  const area = prepare(canvas, Math.max(lanes * (thick + gap) + axis, 90));
  if (!area) return;
  const { context, width, height } = area;
  const x = (time) => width - ((now - time) / span) * width;
  context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "alphabetic";
  context.textAlign = "center";
  for (let seconds = 0; seconds <= span; seconds += 10) {
    const at = Math.round(x(now - seconds)) - 0.5;
    context.fillStyle = colour("line");
    context.fillRect(at, 0, 1, height - axis + 4);
    context.fillStyle = colour("soft");
    if (seconds && at > 24) context.fillText(`−${seconds} s`, at, height - 3);
  }
  for (const bar of bars) {
    const y = bar.lane * (thick + gap);
    const end = bar.end ?? now;
    const tint = colour(`c${bar.colour}`);
    segment(context, x(bar.arrival), x(bar.start ?? end), y, thick, tint, 0, true);
    if (bar.start !== null) segment(context, x(bar.start), x(bar.first ?? end), y, thick, tint, 0.45, false);
    if (bar.first !== null) segment(context, x(bar.first), x(end), y, thick, tint, bar.end === null ? 1 : 0.75, false);
    const room = x(end) - Math.max(0, x(bar.first ?? end));
    if (thick > 12 && room > 70) {
      context.fillStyle = colour("sheet");
      context.textAlign = "left";
      context.textBaseline = "middle";
      context.fillText(bar.label, Math.max(0, x(bar.first)) + 7, y + thick / 2 + 0.5, room - 12);
      context.textBaseline = "alphabetic";
    }
  }
}

function segment(context, from, to, y, thick, tint, alpha, outlined) {
  if (to < 0 || to - from < 0.3) return;
  const [left, wide] = [Math.max(from, -4), to - Math.max(from, -4)];
  context.beginPath();
  context.roundRect(left, y, Math.max(wide, 1.5), thick, Math.min(3, thick / 2));
  if (outlined) {
    // Waiting: an outline only, since nothing is done for it yet.
    context.globalAlpha = 0.6;
    context.strokeStyle = tint;
    context.lineWidth = 1;
    context.setLineDash([3, 3]);
    context.stroke();
    context.setLineDash([]);
  } else {
    context.globalAlpha = alpha;
    context.fillStyle = tint;
    context.fill();
  }
  context.globalAlpha = 1;
}
