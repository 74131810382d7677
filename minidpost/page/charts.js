// Charts as inline SVG: lines and bars, each with a legend, a table of its values, and a reading by pointer or arrow keys.

const N_COLOURS = 8;
const PLOT = { height: 250, right: 14, top: 24, bottom: 34 };
const MANY_POINTS = 900; // beyond, a line is drawn as means of so many equal parts

function colour(place) {
  return `var(--c${place % N_COLOURS})`;
}

function strokeOf(line) {
  if (line.origin === "metric") return "var(--soft)";
  return line.origin === "paper" ? "var(--paper)" : colour(line.colour);
}

function dashOf(line) {
  if (line.origin === "paper") return ["5 4", "1.5 3.5", "8 3 2 3"][line.colour % 3];
  return line.isDashed ? "5 3" : null;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(name, value);
  }
  for (const child of children.flat()) element.append(child instanceof Node ? child : visible(String(child)));
  return element;
}

// -- scales -----------------------------------------------------------------------------------------------------------

// A scale from values to pixels. Its ends are the values' own, with some air where `air` says so.
function scaleOf(values, pixels, axis, air) {
  let low = values.reduce((a, b) => Math.min(a, b), Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const f = axis.is_log ? Math.log : (value) => value;
  if (low === high) {
    low = axis.is_log ? low / 1.5 : low - (Math.abs(low) * 0.1 || 0.5);
    high = axis.is_log ? high * 1.5 : high + (Math.abs(high) * 0.1 || 0.5);
  }
  let from = f(low);
  let to = f(high);
  const margin = air * (to - from);
  const isPositive = low >= 0 && !axis.is_log;
  from = isPositive ? Math.max(0, from - margin) : from - margin;
  to += margin;
  if (axis.is_percent) to = Math.min(to, Math.max(1, high));
  const at = (value) => pixels[0] + ((f(value) - from) / (to - from)) * (pixels[1] - pixels[0]);
  const back = axis.is_log ? Math.exp : (value) => value;
  return { at, low: back(from), high: back(to) };
}

// Round numbers between two ends.
function ticksOf(low, high, axis, most) {
  if (axis.is_log) return logTicks(low, high, most);
  const least = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(least));
  let step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= least * 0.999);
  if (axis.is_whole) step = Math.max(1, Math.ceil(step));
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) ticks.push(Number((n * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, most) {
  for (const parts of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const part of parts) {
        const tick = Number(`${part}e${power}`);
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
    if (ticks.length <= most) return ticks;
  }
  const powers = [];
  const step = Math.ceil((Math.log10(high) - Math.log10(low)) / most);
  for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power += step) powers.push(10 ** power);
  return powers;
}

function tickText(value, axis) {
  return axis.is_percent ? short(value * 100) : short(value);
}

function valueText(point, axis) {
  const one = (value) => (axis.is_percent ? `${(100 * value).toFixed(1)}` : short(value));
  const unit = axis.is_percent ? "%" : "";
  const range = point.low === undefined ? "" : ` (${one(point.low)}–${one(point.high)})`;
  return `${one(point.value)}${unit}${range}`;
}

// -- a chart ----------------------------------------------------------------------------------------------------------

let n_charts = 0;

// A figure that is drawn anew whenever its width changes.
function chart(kind, panel) {
  const figure = make("figure", {}, panel.title ? make("figcaption", {}, panel.title) : null);
  const place = make("div", { class: "plot" });
  figure.append(place, legendOf(panel), folded("values", () => valuesTable(kind, panel)));
  n_charts += 1;
  const id = `chart-${n_charts}`;
  let width = 0;
  const observer = new ResizeObserver(() => {
    const now = Math.round(place.clientWidth);
    if (!now || Math.abs(now - width) < 2) return;
    width = now;
    place.replaceChildren(kind === "bars" ? drawBars(panel, width, id) : drawLines(panel, width, id));
  });
  observer.observe(place);
  return figure;
}

function legendOf(panel) {
  // The checkboxes above the trainings name the runs; of two metrics in one chart each has its own kind of line.
  const dashes = [...new Set(panel.series.map((line) => line.metric))].map((name, place) => ({ name, colour: 0, isDashed: place > 0, origin: "metric" }));
  const lines = panel.series[0].isThin ? dashes : panel.series;
  if (lines === dashes && lines.length < 2) return "";
  const entries = lines.map((line) => {
    const sample = svg("svg", { viewBox: "0 0 22 10", width: 22, height: 10, "aria-hidden": "true" });
    sample.append(svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: strokeOf(line), "stroke-width": panel.groups ? 8 : 2.5, "stroke-dasharray": panel.groups ? null : dashOf(line) }));
    return make("span", {}, sample, line.name);
  });
  return make("div", { class: "legend" }, entries);
}

function summary(panel) {
  const lines = panel.series.map((line) => {
    const known = line.points.filter((point) => point);
    if (!known.length) return line.name;
    return `${line.name}: ${valueText(known[0], panel.y)} to ${valueText(known[known.length - 1], panel.y)}`;
  });
  return `${panel.title}. ${panel.y.label}. ${lines.join("; ")}. Arrow keys read the values.`;
}

function valuesTable(kind, panel) {
  if (kind === "bars") {
    const rows = panel.groups.map((group, place) => [group, ...panel.series.map((line) => (line.points[place] ? valueText(line.points[place], panel.y) : "–"))]);
    return table(["", ...panel.series.map((line) => line.name)], rows);
  }
  const most = 400; // rows: of long logs the file has the rest
  const rows = panel.series.flatMap((line) => {
    const step = Math.ceil(line.points.length / (most / panel.series.length));
    return line.points.filter((_, place) => place % step === 0).map((point) => [line.name, point.label ?? short(point.x), valueText(point, panel.y)]);
  });
  return table(["", panel.x.label, panel.y.label], rows);
}

// -- lines ------------------------------------------------------------------------------------------------------------

// Long lines are drawn as the means of equal parts.
function thinned(points) {
  if (points.length <= MANY_POINTS) return points;
  const size = points.length / MANY_POINTS;
  const parts = [];
  for (let part = 0; part < MANY_POINTS; part += 1) {
    const members = points.slice(Math.floor(part * size), Math.floor((part + 1) * size));
    const mean = (name) => members.reduce((sum, point) => sum + point[name], 0) / members.length;
    parts.push({ x: mean("x"), value: mean("value") });
  }
  return parts;
}

function drawLines(panel, width, id) {
  const { height, right, top, bottom } = PLOT;
  const all = panel.series.flatMap((line) => line.points);
  const xs = all.map((point) => point.x);
  const ys = all.flatMap((point) => [point.value, point.low ?? point.value, point.high ?? point.value]);
  const isFew = !panel.series[0].isThin;
  const y = scaleOf(ys, [height - bottom, top], panel.y, 0.06);
  const yTicks = ticksOf(y.low, y.high, panel.y, 6);
  const left = 14 + 6.5 * Math.max(3, ...yTicks.map((tick) => tickText(tick, panel.y).length));
  const x = scaleOf(xs, [left + (isFew ? 10 : 0), width - right - (isFew ? 10 : 0)], panel.x, 0);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": visible(summary(panel)), id });
  drawing.append(svg("text", { x: 2, y: 13 }, panel.y.label));

  // 1) Axes.
  for (const tick of yTicks) {
    drawing.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: y.at(tick), y2: y.at(tick) }));
    drawing.append(svg("text", { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, tickText(tick, panel.y)));
  }
  const own = [...new Set(xs)].sort((a, b) => a - b);
  const isOwn = panel.x.is_log && own.length <= 8 && own.every((value, place) => !place || x.at(value) - x.at(own[place - 1]) > 28) && own.every((value) => value < 1e6);
  for (const tick of isOwn ? own : ticksOf(x.low, x.high, panel.x, Math.max(3, Math.floor(width / 80)))) {
    drawing.append(svg("line", { class: "axis", x1: x.at(tick), x2: x.at(tick), y1: height - bottom, y2: height - bottom + 4 }));
    drawing.append(svg("text", { x: x.at(tick), y: height - bottom + 16, "text-anchor": "middle" }, tickText(tick, panel.x)));
  }
  drawing.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, panel.x.label));

  // 2) Where one stage ends and the next begins.
  for (const boundary of panel.boundaries ?? []) {
    const at = x.at(boundary.x);
    if (boundary.x > 0) drawing.append(svg("line", { class: "boundary", x1: at, x2: at, y1: top, y2: height - bottom }));
    drawing.append(svg("text", { x: at + 3, y: top + 9 }, boundary.label));
  }

  // 3) Lines, with intervals where there are some.
  for (const line of panel.series) {
    const stroke = strokeOf(line);
    const points = thinned(line.points);
    const path = points.map((point, place) => `${place ? "L" : "M"}${x.at(point.x).toFixed(1)} ${y.at(point.value).toFixed(1)}`).join("");
    for (const point of points) {
      if (point.low === undefined) continue;
      drawing.append(svg("line", { x1: x.at(point.x), x2: x.at(point.x), y1: y.at(point.low), y2: y.at(point.high), stroke, "stroke-width": 1, opacity: 0.7 }));
    }
    drawing.append(svg("path", { d: path, fill: "none", stroke, "stroke-width": line.isThin ? 1.3 : 2, "stroke-dasharray": dashOf(line), "stroke-linejoin": "round" }));
    if (!line.isThin || points.length === 1) {
      for (const point of points) drawing.append(svg("circle", { cx: x.at(point.x), cy: y.at(point.value), r: 4, fill: stroke, stroke: "var(--panel)", "stroke-width": 1.5 }));
    }
  }
  readable(drawing, panel, own, x, width);
  return drawing;
}

// The points of a line at a place on the x axis, or the nearest before it.
function pointAt(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (points[middle].x <= x) low = middle;
    else high = middle - 1;
  }
  return points.length && points[low].x === x ? points[low] : null;
}

// Reading values: the pointer or the arrow keys choose a place on the x axis.
function readable(drawing, panel, own, x, width) {
  const { height, top, bottom } = PLOT;
  const cross = svg("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  drawing.append(cross);
  let place = -1;
  const show = (chosen) => {
    place = Math.max(0, Math.min(own.length - 1, chosen));
    const at = x.at(own[place]);
    cross.setAttribute("x1", at);
    cross.setAttribute("x2", at);
    cross.setAttribute("visibility", "visible");
    const lines = panel.series.map((line) => [line, pointAt(line.points, own[place])]).filter(([, point]) => point);
    const head = lines[0]?.[1].label ?? `${panel.x.label} ${tickText(own[place], panel.x)}`;
    const rows = lines.map(([line, point]) => make("div", {}, make("b", {}, valueText(point, panel.y)), ` ${line.name}`));
    const box = drawing.getBoundingClientRect();
    showTip([make("div", { class: "soft" }, head), ...rows], box.left + (at / width) * box.width, box.top + 20);
  };
  const hide = () => {
    cross.setAttribute("visibility", "hidden");
    hideTip();
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    let nearest = 0;
    let low = 0;
    let high = own.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (Math.abs(x.at(own[middle]) - at) < Math.abs(x.at(own[nearest]) - at)) nearest = middle;
      if (x.at(own[middle]) < at) low = middle + 1;
      else high = middle - 1;
    }
    show(nearest);
  });
  drawing.addEventListener("pointerleave", hide);
  drawing.addEventListener("blur", hide);
  drawing.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: own.length - 1, PageUp: place - 50, PageDown: place + 50 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

function showTip(content, left, top) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(4, Math.min(left + 12, room)) + scrollX}px`;
  tip.style.top = `${top + scrollY}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

// -- bars -------------------------------------------------------------------------------------------------------------

// Lying bars, a group below the other: names of runs are long.
function drawBars(panel, width, id) {
  const bar = 15;
  const head = 18;
  const groupHeight = head + panel.series.length * (bar + 2) + 8;
  const height = panel.groups.length * groupHeight + 6;
  const known = panel.series.flatMap((line) => line.points).filter((point) => point);
  const largest = known.reduce((most, point) => Math.max(most, point.high ?? point.value), 0) || 1;
  const room = width - 150; // for the values at the ends
  const at = (value) => (value / largest) * room;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": visible(summary(panel)), id });
  panel.groups.forEach((group, place) => {
    const top = place * groupHeight;
    drawing.append(svg("text", { x: 0, y: top + 13 }, group));
    panel.series.forEach((line, row) => {
      const y = top + head + row * (bar + 2);
      const point = line.points[place];
      if (!point) {
        drawing.append(svg("text", { x: 2, y: y + 12 }, "–"));
        return;
      }
      drawing.append(svg("rect", { x: 0, y, width: Math.max(1, at(point.value)), height: bar, rx: 2, fill: panel.origins[place] === "paper" ? "var(--paper)" : strokeOf(line), opacity: panel.origins[place] === "paper" && row === 0 ? 0.6 : 1 }));
      if (point.low !== undefined) drawing.append(svg("line", { x1: at(point.low), x2: at(point.high), y1: y + bar / 2, y2: y + bar / 2, stroke: "var(--ink)" }));
      drawing.append(svg("text", { class: "value", x: at(point.high ?? point.value) + 6, y: y + 12 }, valueText(point, panel.y)));
    });
  });
  drawing.append(svg("line", { class: "axis", x1: 0, x2: 0, y1: 0, y2: height }));
  return drawing;
}
