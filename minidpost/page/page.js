"use strict";
// The page: its parts, texts that cannot become markup, the sections of runs, exhibits and trainings, and --watch.

// -- parts: what the file or the server holds by name -----------------------------------------------------------------

let page = null; // the part "page"
let version = null; // of the part "page", where a server gives it

// The text of a part within the file; it may come after this script, so that the whole file is waited for.
async function partInFile(name) {
  if (document.readyState === "loading" && !document.getElementById(name)) {
    await new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }));
  }
  const element = document.getElementById(name);
  if (!element) throw new Error(`${name} is not in this page`);
  return JSON.parse(element.textContent);
}

async function partOfServer(name) {
  const response = await fetch(`part/${name}`, { cache: "no-store" });
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response.json();
}

// A compressed part: JSON, gzip, base64.
async function load(name) {
  return unpack(page.is_watched ? await partOfServer(name) : await partInFile(name));
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// -- texts ------------------------------------------------------------------------------------------------------------

// Characters that cannot be seen, or that turn the direction of writing: all but line breaks and tabs are named.
const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/u;
const UNSEEN_PARTS = /((?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}])/u;

function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

// A text as one string, for attributes and SVG.
function visible(text) {
  return UNSEEN.test(text) ? text.split(UNSEEN_PARTS).map((part) => (UNSEEN.test(part) ? codePoint(part) : part)).join("") : text;
}

// A text as nodes: it is never markup.
function shown(text) {
  if (!UNSEEN.test(text)) return document.createTextNode(text);
  const fragment = document.createDocumentFragment();
  for (const part of text.split(UNSEEN_PARTS)) {
    if (!UNSEEN.test(part)) {
      fragment.append(document.createTextNode(part));
      continue;
    }
    const mark = document.createElement("span");
    mark.className = "control";
    mark.textContent = codePoint(part);
    fragment.append(mark);
  }
  return fragment;
}

// An element with attributes and children, which are elements or texts.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : visible(String(value)));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child instanceof Node ? child : shown(String(child)));
  }
  return element;
}

function whole(n) {
  return n.toLocaleString("en-US");
}

function short(n) {
  if (n === 0) return "0";
  const size = Math.abs(n);
  if (size >= 1e7 || size < 1e-3) return n.toExponential(2).replace(/\.?0*e\+?/, "e").replaceAll("-", "−");
  if (size >= 1000) return whole(Math.round(n));
  return String(Number(n.toPrecision(4))).replace("-", "−");
}

// A table; a cell is a text or a score.
function table(heads, rows, caption = "", hasOrigin = false) {
  const cellOf = (cell) => make("td", { class: cell.text !== undefined ? "score" : cell.length < 40 ? "brief" : null }, cell.text ?? cell);
  const body = rows.map((row) => {
    const cells = (row.cells ?? row).map(cellOf);
    if (hasOrigin) cells.unshift(make("td", {}, make("span", { class: "origin" }, row.origin === "paper" ? "the paper's" : "ours")));
    return make("tr", { class: row.origin ?? null }, cells);
  });
  const head = make("tr", {}, [...(hasOrigin ? ["from"] : []), ...heads].map((text) => make("th", { scope: "col" }, text)));
  const content = make("table", {}, caption ? make("caption", {}, caption) : null, make("thead", {}, head), make("tbody", {}, body));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption || heads.join(", ") }, content);
}

// What is folded is made when it is opened.
function folded(title, content) {
  const element = make("details", {}, make("summary", {}, title));
  element.addEventListener("toggle", () => {
    if (element.open && element.children.length === 1) element.append(content());
  });
  return element;
}

function fill(id, ...children) {
  document.querySelector(`#${id} > div`).replaceChildren(...children.flat().filter((child) => child));
}

// -- runs -------------------------------------------------------------------------------------------------------------

const STATES = { finished: "good", running: "blue", stopped: "warn", unfinished: "warn" };

function runPanel(run, index) {
  const written = run.written_at ? `last written ${run.written_at}` : "";
  const planned = run.n_iterations === null ? "" : ` of ${run.n_iterations + 1}`;
  const head = make("h3", {}, swatch(index), run.name, " ", make("span", { class: `badge ${STATES[run.state] ?? ""}` }, run.state));
  const panel = make("div", { class: "panel" }, head);
  if (run.settings.length) {
    panel.append(make("p", { class: "soft" }, `${run.model}, ${run.method}, data ${run.data}, seed ${run.seed} · evaluations ${run.n_finished}${planned} · ${written}`));
  }
  panel.append(...run.notes.map((note) => make("p", { class: "note" }, note)));
  if (run.at_work.length) panel.append(make("p", {}, `At work, or stopped within: ${run.at_work.join(", ")}`));
  for (const part of run.tables) panel.append(table(part.heads, part.rows, part.title));
  if (run.best) panel.append(make("p", {}, run.best));
  if (run.stages.length) panel.append(stageBar(run.stages));
  if (run.settings.length) {
    const versions = Object.entries(run.versions).map(([name, value]) => `${name} ${value}`).join(", ");
    panel.append(folded("Settings and versions", () => make("div", {}, make("p", { class: "soft" }, `${run.path} · ${versions}`), table(["setting", "value"], run.settings))));
  }
  if (run.stages.length) panel.append(folded("Stages", () => stageTable(run.stages)));
  if (run.log.length) panel.append(folded("The end of log.txt", () => make("pre", { tabindex: "0" }, run.log.join("\n"))));
  return panel;
}

function swatch(index) {
  const square = svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true", class: "swatch" }, svg("rect", { width: 12, height: 12, rx: 3, fill: colour(index) }));
  square.style.cssText = "display: inline-block; width: 12px; margin-right: 7px";
  return square;
}

const KINDS = [["sft", "SFT", 0], ["dpo", "DPO", 1], ["samples", "sampling", 2], ["evaluation", "evaluation", 3]];

function kindOf(stage) {
  const name = stage.split("/")[1] ?? "";
  return KINDS.find(([beginning]) => name.startsWith(beginning)) ?? ["", "other", 5];
}

// How the seconds of a run were spent, stage after stage.
function stageBar(stages) {
  const total = stages.reduce((sum, stage) => sum + stage.seconds, 0);
  const spent = {};
  const bar = make("div", { class: "stages", role: "img" });
  for (const stage of stages) {
    const [, kind, place] = kindOf(stage.stage);
    spent[kind] = (spent[kind] ?? 0) + stage.seconds;
    const piece = make("span", { title: `${stage.stage}: ${stage.seconds} s` });
    piece.style.cssText = `flex: ${stage.seconds} 0 0; background: ${colour(place)}`;
    bar.append(piece);
  }
  const parts = Object.entries(spent).map(([kind, seconds]) => `${kind} ${duration(seconds)}`);
  bar.setAttribute("aria-label", `time by stage: ${parts.join(", ")}`);
  const legend = Object.keys(spent).map((kind) => make("span", {}, swatch((KINDS.find((entry) => entry[1] === kind) ?? [0, 0, 5])[2]), `${kind} ${duration(spent[kind])}`));
  return make("div", {}, bar, make("div", { class: "legend" }, make("span", {}, `${duration(total)} in all:`), legend));
}

function duration(seconds) {
  if (seconds < 100) return `${short(Math.round(seconds * 10) / 10)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function stageTable(stages) {
  const rows = stages.map((stage) => {
    const counts = Object.entries(stage).filter(([name]) => !["stage", "seconds"].includes(name));
    return [stage.stage, `${stage.seconds} s`, counts.map(([name, value]) => `${name} ${name === "flops" ? short(value) : whole(value)}`).join(", ")];
  });
  return table(["stage", "seconds", "counts"], rows);
}

function drawRuns() {
  const none = make("p", {}, "No run here yet. ", make("code", {}, "python train.py"), " makes one.");
  fill("runs", page.runs.length ? page.runs.map(runPanel) : none);
}

// -- exhibits ---------------------------------------------------------------------------------------------------------

function exhibitPanel(exhibit) {
  const panel = make("div", { class: "panel", id: exhibit.id }, make("h3", {}, exhibit.title));
  if (exhibit.kind === "missing") {
    panel.append(make("p", {}, `Not drawn: it needs ${exhibit.needs}. `, make("code", {}, exhibit.command)));
    return panel;
  }
  panel.append(make("p", { class: "soft" }, exhibit.caption));
  if (exhibit.kind === "table") {
    for (const part of exhibit.parts) panel.append(table(part.heads, part.rows, part.title, true));
    panel.append(folded("as Markdown", () => make("pre", { tabindex: "0" }, exhibit.markdown)));
    panel.append(folded("as LaTeX", () => make("pre", { tabindex: "0" }, exhibit.latex)));
  } else {
    panel.append(make("div", { class: "grid" }, exhibit.panels.map((part) => chart(exhibit.kind, part))));
  }
  panel.append(...exhibit.notes.map((note) => make("p", { class: "soft" }, note)));
  return panel;
}

function drawExhibits() {
  fill("exhibits", page.exhibits.map(exhibitPanel));
}

// -- training ---------------------------------------------------------------------------------------------------------

const TRAINING_CHARTS = {
  sft: [
    ["Loss", "nats a target token", ["loss"]],
    ["Learning rate", "", ["lr"]],
    ["Gradient norm", "before clipping", ["grad_norm"]],
    ["Speed", "tokens a second", ["tokens_per_second"]],
  ],
  dpo: [
    ["Loss", "nats a pair", ["loss"]],
    ["log π of chosen and rejected", "nats", ["chosen_logp", "rejected_logp"]],
    ["Margin", "reward of chosen − reward of rejected", ["margin"]],
    ["Accuracy", "fraction of pairs with a positive margin", ["accuracy"]],
    ["Learning rate", "", ["lr"]],
    ["Gradient norm", "before clipping", ["grad_norm"]],
    ["Speed", "tokens a second", ["tokens_per_second"]],
  ],
};
const TRAINING_TITLES = { sft: "Supervised fine-tuning, iteration after iteration", dpo: "DPO, iteration after iteration" };
const hiddenRuns = new Set(); // names of runs that are not drawn
let isLog = true;

// The trainings of one kind, one after the other: where each begins, and its points.
function trainingLines(run, kind, metric, log) {
  let start = 0;
  const found = [];
  const boundaries = [];
  for (const training of run.trainings.filter((one) => one.stage.endsWith(`/${kind}`))) {
    boundaries.push({ x: start, label: training.stage.replace("iteration-", "").replace(`/${kind}`, "") });
    const values = training.columns[metric];
    values.forEach((value, step) => {
      if (value !== null && !(log && value <= 0)) found.push({ x: start + step, value, label: `${training.stage}, step ${training.columns.step[step]}` });
    });
    start += values.length;
  }
  return { points: found, boundaries };
}

function trainingPanel(kind, [title, label, metrics]) {
  const series = [];
  let boundaries = [];
  const runs = page.runs.filter((run) => !hiddenRuns.has(run.name));
  const all = runs.flatMap((run) => run.trainings.filter((one) => one.stage.endsWith(`/${kind}`)).flatMap((one) => metrics.flatMap((metric) => one.columns[metric])));
  const known = all.filter((value) => value !== null);
  const log = isLog && ["loss", "grad_norm"].includes(metrics[0]) && known.length > 0 && known.every((value) => value > 0);
  for (const run of runs) {
    metrics.forEach((metric, place) => {
      const line = trainingLines(run, kind, metric, log);
      if (!line.points.length) return;
      boundaries = line.boundaries.length > boundaries.length ? line.boundaries : boundaries;
      const name = metrics.length > 1 ? `${run.name}, ${metric.replace("_logp", "")}` : run.name;
      series.push({ name, origin: "ours", metric: metric.replace("_logp", ""), colour: page.runs.indexOf(run), isDashed: place > 0, isThin: true, points: line.points });
    });
  }
  if (!series.length) return null;
  return chart("lines", { title, x: { label: "optimizer step" }, y: { label, is_log: log }, series, boundaries });
}

function drawTraining() {
  const controls = make("div", { class: "controls" });
  for (const run of page.runs.filter((one) => one.trainings.length)) {
    const box = make("input", { type: "checkbox", checked: !hiddenRuns.has(run.name), id: `show-${page.runs.indexOf(run)}` });
    box.addEventListener("change", () => {
      if (box.checked) hiddenRuns.delete(run.name);
      else hiddenRuns.add(run.name);
      drawTraining();
      document.getElementById(box.id).focus();
    });
    controls.append(make("label", { class: "check" }, box, swatch(page.runs.indexOf(run)), run.name));
  }
  const scale = make("input", { type: "checkbox", checked: isLog, id: "log-scale" });
  scale.addEventListener("change", () => {
    isLog = scale.checked;
    drawTraining();
    document.getElementById("log-scale").focus();
  });
  controls.append(make("label", { class: "check" }, scale, "logarithmic loss and gradient norm"));
  const panels = Object.entries(TRAINING_CHARTS).map(([kind, charts]) => {
    const drawn = charts.map((one) => trainingPanel(kind, one)).filter((one) => one);
    return drawn.length ? make("div", { class: "panel" }, make("h3", {}, TRAINING_TITLES[kind]), make("div", { class: "grid" }, drawn)) : null;
  });
  if (panels.some((panel) => panel)) fill("training", controls, panels);
  else fill("training", page.runs.some((run) => run.trainings.length) ? controls : make("p", {}, "No training has written its log yet."));
}

// -- the whole --------------------------------------------------------------------------------------------------------

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

function draw() {
  document.getElementById("made").textContent = `${page.version} · ${page.is_watched ? "as of" : "made"} ${page.made}${page.is_watched ? ", watching" : ""}`;
  drawRuns();
  drawExhibits();
  drawTraining();
}

// Ask the server for what has changed; it answers 304 where nothing has.
async function watch() {
  try {
    const response = await fetch("part/page", { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
    if (response.status === 200) {
      version = response.headers.get("ETag");
      const focused = document.activeElement ? document.activeElement.id : "";
      const open = [...document.querySelectorAll("#runs details, #exhibits details")].map((element) => element.open);
      page = await response.json();
      draw();
      [...document.querySelectorAll("#runs details, #exhibits details")].forEach((element, place) => (element.open = Boolean(open[place])));
      if (focused && document.getElementById(focused)) document.getElementById(focused).focus({ preventScroll: true });
      await refreshReading();
    }
    document.getElementById("made").classList.remove("note");
  } catch (error) {
    document.getElementById("made").textContent = "report.py --watch does not answer any more";
    document.getElementById("made").classList.add("note");
  }
  setTimeout(watch, 2000);
}

function start() {
  page = JSON.parse(document.getElementById("page").textContent);
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  });
  matchMedia("print").addEventListener("change", (event) => event.matches && setTheme("light"));
  draw();
  startReading();
  if (page.is_watched) setTimeout(watch, 2000);
}
