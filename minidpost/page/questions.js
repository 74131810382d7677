// Reading: the questions of a run, filtered, searched and sorted by their index; a block is opened when it is looked at.

const ROW_HEIGHT = 54; // as in the style
const OK = 0, WRONG = 1, COPIED = 2, DEPARTS = 3; // of a step, as in questions.py
const CORRECT = 1, NO_ANSWER = 2, UNGRADED = 3, CUT = 4; // of a sample
const ALL_FORCED = 1, SOME_FORCED = 2;

const POOL_FILTERS = {
  all: "all",
  right: "every sample right",
  mixed: "some right, some wrong",
  wrong: "no sample right",
  changed: "changed from the first round to the last",
  rose: "more often right in the last round",
  fell: "less often right in the last round",
  no_answer: "with a sample without an answer",
  cut: "with a sample cut at the length limit",
  pairs: "in preference pairs",
  labels: "with pseudo-labels",
};
const SET_FILTERS = {
  all: "all",
  right: "right in every iteration",
  wrong: "wrong in every iteration",
  changed: "changed over the iterations",
  gained: "wrong at first, right at last",
  lost: "right at first, wrong at last",
};
const POOL_SORTS = { number: "number", rarest: "least often right first", commonest: "most often right first", change: "largest change first" };

// -- choosing: plain functions from an index to the numbers of questions --------------------------------------------------

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

// How often a question was right, as a fraction of its samples in the rounds; null without samples.
function fractionRight(index, question, rounds) {
  const n = sum(rounds.map((round) => index.rounds[round].samples[question]));
  return n ? sum(rounds.map((round) => index.rounds[round].correct[question])) / n : null;
}

// The change from the first round that sampled a question to the last, as a difference of fractions.
function changeOf(index, question) {
  const sampled = index.rounds.map((_, round) => round).filter((round) => index.rounds[round].samples[question]);
  if (sampled.length < 2) return 0;
  return fractionRight(index, question, [sampled[sampled.length - 1]]) - fractionRight(index, question, [sampled[0]]);
}

function poolPasses(index, question, filter, rounds) {
  const right = fractionRight(index, question, rounds);
  const any = (name) => rounds.some((round) => index.rounds[round][name][question] > 0);
  switch (filter) {
    case "right": return right === 1;
    case "mixed": return right !== null && right > 0 && right < 1;
    case "wrong": return right === 0;
    case "changed": return changeOf(index, question) !== 0;
    case "rose": return changeOf(index, question) > 0;
    case "fell": return changeOf(index, question) < 0;
    case "no_answer": return any("no_answer");
    case "cut": return any("cut");
    case "pairs": return index.pairs.some((counts) => counts[question] > 0);
    case "labels": return index.labels.some((counts) => counts[question] > 0);
    default: return true;
  }
}

// The models that a set's questions are compared over: the fine-tuned ones, in order.
function modelsOf(set) {
  return set.models.filter((model) => model.name.endsWith("/sft"));
}

function setPasses(set, question, filter) {
  const outcomes = modelsOf(set).map((model) => model.correct[question]);
  const first = outcomes[0];
  const last = outcomes[outcomes.length - 1];
  switch (filter) {
    case "right": return outcomes.every((outcome) => outcome === 1);
    case "wrong": return outcomes.every((outcome) => outcome === 0);
    case "changed": return outcomes.some((outcome) => outcome !== first);
    case "gained": return first === 0 && last === 1;
    case "lost": return first === 1 && last === 0;
    default: return true;
  }
}

// The numbers of the questions to be listed. `choice` has set (-1: the pool), filter, round (-1: all), sort, search.
function chosenQuestions(index, choice) {
  const words = choice.search.toLowerCase();
  if (choice.set >= 0) {
    const set = index.sets[choice.set];
    const found = [];
    for (let question = 0; question < set.n; question += 1) {
      const text = set.questions ? `${set.questions[question]}\n${set.answers[question]}` : `question ${question + 1}`;
      if (setPasses(set, question, choice.filter) && (!words || text.toLowerCase().includes(words))) found.push(question);
    }
    if (choice.sort === "number") return found;
    const right = found.map((question) => sum(modelsOf(set).map((model) => model.correct[question])));
    return sorted(found, right, choice.sort === "rarest" ? 1 : -1);
  }
  const rounds = choice.round < 0 ? index.rounds.map((_, round) => round) : [choice.round];
  const found = [];
  for (let question = 0; question < index.questions.length; question += 1) {
    if (!poolPasses(index, question, choice.filter, rounds)) continue;
    if (words && !index.questions[question].toLowerCase().includes(words) && index.answers[question]?.toLowerCase() !== words) continue;
    found.push(question);
  }
  if (choice.sort === "number") return found;
  if (choice.sort === "change") return sorted(found, found.map((question) => Math.abs(changeOf(index, question))), -1);
  return sorted(found, found.map((question) => fractionRight(index, question, rounds) ?? -1), choice.sort === "rarest" ? 1 : -1);
}

// Questions by keys, those with equal keys by number.
function sorted(questions, keys, direction) {
  const order = questions.map((_, place) => place);
  order.sort((a, b) => direction * (keys[a] - keys[b]) || questions[a] - questions[b]);
  return order.map((place) => questions[place]);
}

// -- the list -----------------------------------------------------------------------------------------------------------

const reading = { run: -1, path: null, index: null, found: [], chosen: -1, blocks: new Map(), choice: { set: -1, filter: "all", round: -1, sort: "number", search: "" } };
const parts = {}; // the elements of the section

// The names of the runs that have something to read, by their place.
function runsToRead() {
  const runs = page.runs.map((run, place) => [run, place]).filter(([run]) => run.has_samples || run.results);
  return Object.fromEntries(runs.map(([run, place]) => [place, run.name]));
}

function startReading() {
  const runs = runsToRead();
  if (!Object.keys(runs).length) {
    fill("reading", make("p", {}, "No run has sampled or evaluated anything yet."));
    return;
  }
  parts.run = select("run", runs, () => openRun(Number(parts.run.value)));
  parts.set = select("questions", {}, () => choose({ set: Number(parts.set.value), filter: "all", sort: "number", round: -1 }));
  parts.filter = select("show", {}, () => choose({ filter: parts.filter.value }));
  parts.round = select("over", {}, () => choose({ round: Number(parts.round.value) }));
  parts.sort = select("sort by", {}, () => choose({ sort: parts.sort.value }));
  parts.search = make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false" });
  parts.search.addEventListener("input", () => choose({ search: parts.search.value }));
  parts.count = make("p", { class: "soft", role: "status", id: "count" });
  parts.space = make("div", { role: "presentation" });
  parts.list = make("div", { class: "list", id: "list", role: "listbox", tabindex: "0", "aria-label": "questions" }, parts.space);
  parts.detail = make("div", { class: "panel detail", id: "detail", tabindex: "0", role: "region", "aria-label": "the chosen question" });
  parts.notes = make("div", {});
  parts.list.addEventListener("scroll", drawRows, { passive: true });
  parts.list.addEventListener("keydown", moveByKey);
  parts.list.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) pick(Number(row.dataset.place));
  });
  const labelled = (text, element) => make("label", {}, text, element);
  const controls = make("div", { class: "controls" }, labelled("run", parts.run), labelled("questions", parts.set), labelled("show", parts.filter), labelled("over", parts.round), labelled("sort by", parts.sort), labelled("search in questions", parts.search));
  fill("reading", controls, parts.notes, parts.count, make("div", { class: "reader" }, parts.list, parts.detail));
  new ResizeObserver(drawRows).observe(parts.list);
  // Only when the section comes near the screen is its index opened.
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    openRun(Number(parts.run.value));
  }, { rootMargin: "600px" });
  near.observe(parts.list);
}

function select(name, options, changed) {
  const element = make("select", { id: `choose-${name.replace(" ", "-")}` });
  setOptions(element, options);
  element.addEventListener("change", changed);
  return element;
}

function setOptions(element, options, value) {
  element.replaceChildren(...Object.entries(options).map(([key, text]) => make("option", { value: key }, visible(text))));
  if (value !== undefined) element.value = String(value);
}

async function openRun(run) {
  reading.run = run;
  reading.path = page.runs[run].path;
  reading.blocks = new Map();
  parts.count.textContent = "opening …";
  try {
    reading.index = await load(`questions/${run}`);
  } catch (error) {
    parts.count.textContent = `The questions cannot be opened here (${error.message}); a browser of 2023 or later is needed.`;
    return;
  }
  const index = reading.index;
  const names = index.sets.map((set, place) => [place, `${set.name}, evaluated (${whole(set.n)})`]);
  const pool = index.questions.length ? [["-1", `sampled for (${whole(index.questions.length)})`]] : [];
  const first = pool.length ? -1 : 0;
  const set = reading.choice.set < index.sets.length ? reading.choice.set : first;
  // An object would put the key -1 after the others.
  parts.set.replaceChildren(...[...pool, ...names].map(([key, text]) => make("option", { value: key }, text)));
  parts.set.value = String(pool.length ? set : Math.max(0, set));
  setOptions(parts.round, {}, -1);
  parts.round.append(make("option", { value: "-1" }, "all rounds"), ...index.rounds.map((round, place) => make("option", { value: place }, round.name)));
  parts.notes.replaceChildren(...index.notes.map((note) => make("p", { class: "note" }, note)));
  if (!pool.length && !names.length) {
    parts.count.textContent = "This run has no samples and no evaluation that can be read.";
    reading.index = null;
    return;
  }
  choose({ set: Number(parts.set.value), round: Math.min(reading.choice.round, index.rounds.length - 1) });
}

// With --watch: the index may have grown, and runs may have begun, before the one that is read as well as after it.
async function refreshReading() {
  if (!parts.list) {
    startReading();
    return;
  }
  const runs = runsToRead();
  const place = page.runs.findIndex((run) => run.path === reading.path);
  if (!Object.keys(runs).length) return;
  setOptions(parts.run, runs, place in runs ? place : undefined);
  if (reading.index) {
    const { found, chosen } = reading;
    const number = found[chosen];
    const scroll = parts.list.scrollTop;
    await openRun(Number(parts.run.value));
    parts.list.scrollTop = scroll;
    if (number !== undefined && reading.found.includes(number)) pick(reading.found.indexOf(number), false);
  }
}

function choose(changes) {
  if (!reading.index) return;
  const isOtherSet = "set" in changes && changes.set !== reading.choice.set;
  Object.assign(reading.choice, changes);
  const { choice, index } = reading;
  const isPool = choice.set < 0;
  const filters = isPool ? POOL_FILTERS : SET_FILTERS;
  const sorts = isPool ? POOL_SORTS : { number: "number", rarest: "least often right first", commonest: "most often right first" };
  if (!(choice.filter in filters)) choice.filter = "all";
  if (!(choice.sort in sorts)) choice.sort = "number";
  if (parts.filter.options.length !== Object.keys(filters).length) setOptions(parts.filter, filters);
  if (parts.sort.options.length !== Object.keys(sorts).length) setOptions(parts.sort, sorts);
  parts.filter.value = choice.filter;
  parts.sort.value = choice.sort;
  parts.round.value = String(choice.round);
  parts.round.disabled = !isPool;
  reading.found = chosenQuestions(index, choice);
  const all = isPool ? index.questions.length : index.sets[choice.set].n;
  parts.count.textContent = `${whole(reading.found.length)} of ${whole(all)} questions`;
  parts.space.style.height = `${reading.found.length * ROW_HEIGHT}px`;
  parts.list.scrollTop = 0;
  reading.chosen = -1;
  if (isOtherSet || !reading.found.length) parts.detail.replaceChildren(make("p", { class: "soft" }, reading.found.length ? "Choose a question." : "No question is like that."));
  drawRows();
  if (reading.found.length) pick(0, false);
}

// Only the rows that can be seen are in the page.
function drawRows() {
  if (!reading.index) return;
  const first = Math.max(0, Math.floor(parts.list.scrollTop / ROW_HEIGHT) - 3);
  const last = Math.min(reading.found.length, first + Math.ceil(parts.list.clientHeight / ROW_HEIGHT) + 7);
  const rows = [];
  for (let place = first; place < last; place += 1) rows.push(rowOf(place));
  parts.space.replaceChildren(...rows);
}

function rowOf(place) {
  const question = reading.found[place];
  const { index, choice } = reading;
  const isChosen = place === reading.chosen;
  const isPool = choice.set < 0;
  const set = isPool ? null : index.sets[choice.set];
  const text = isPool ? index.questions[question] : (set.questions?.[question] ?? "its text is not among the run's files");
  const counts = isPool
    ? index.rounds.map((round) => (round.samples[question] ? `${round.correct[question]}/${round.samples[question]}` : "–")).join(" → ")
    : modelsOf(set).map((model) => (model.correct[question] ? "✓" : "✗")).join(" → ");
  const extra = isPool ? [sum(index.pairs.map((of) => of[question])) ? "pairs" : "", sum(index.labels.map((of) => of[question])) ? "labels" : ""].filter((word) => word) : [];
  const row = make("div", { class: isChosen ? "row chosen" : "row", role: "option", id: `row-${place}`, "aria-selected": String(isChosen), "aria-posinset": place + 1, "aria-setsize": reading.found.length, "data-place": place }, make("div", { class: "line" }, text.replace(/\s+/g, " ")), make("div", { class: "counts" }, `${question + 1} · right ${counts}${extra.length ? ` · ${extra.join(", ")}` : ""}`));
  row.style.top = `${place * ROW_HEIGHT}px`;
  return row;
}

function moveByKey(event) {
  const page = Math.floor(parts.list.clientHeight / ROW_HEIGHT);
  const moves = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter") parts.detail.focus();
  if (!(event.key in moves) || !reading.found.length) return;
  event.preventDefault();
  pick(Math.max(0, Math.min(reading.found.length - 1, reading.chosen + moves[event.key])));
}

// Show a question of the list; the list is moved only so far that its row can be seen.
function pick(place, isSeen = true) {
  reading.chosen = place;
  const top = place * ROW_HEIGHT;
  if (isSeen && top < parts.list.scrollTop) parts.list.scrollTop = top;
  if (isSeen && top + ROW_HEIGHT > parts.list.scrollTop + parts.list.clientHeight) parts.list.scrollTop = top + ROW_HEIGHT - parts.list.clientHeight;
  drawRows();
  parts.list.setAttribute("aria-activedescendant", `row-${place}`);
  drawDetail(reading.found[place]);
}

// -- one question -------------------------------------------------------------------------------------------------------

function blockOf(number) {
  const key = `block/${reading.run}/${number}${reading.index.version && `/${reading.index.version}`}`;
  if (!reading.blocks.has(key)) {
    if (reading.blocks.size > 40) reading.blocks.clear();
    reading.blocks.set(key, load(key));
  }
  return reading.blocks.get(key);
}

async function drawDetail(question) {
  const { index, choice } = reading;
  if (choice.set >= 0) {
    parts.detail.replaceChildren(...evaluatedQuestion(index.sets[choice.set], question));
    parts.detail.scrollTop = 0;
    return;
  }
  const chosen = reading.chosen;
  let block;
  try {
    block = await blockOf(Math.floor(question / index.block));
  } catch (error) {
    parts.detail.replaceChildren(make("p", { class: "note" }, `This question cannot be opened (${error.message}).`));
    return;
  }
  if (chosen !== reading.chosen || index !== reading.index) return; // another one was chosen meanwhile
  parts.detail.replaceChildren(...sampledQuestion(index, question, block[question % index.block]));
  parts.detail.scrollTop = 0;
}

function badge(kind, text) {
  return make("span", { class: `badge ${kind}` }, text);
}

const GRADES = { 0: ["bad", "wrong"], 1: ["good", "right"], 2: ["bad", "no answer"], 3: ["", "not graded"] };

function gradeBadge(grade) {
  return badge(...GRADES[grade % CUT]);
}

function sampledQuestion(index, number, entry) {
  const content = [make("h3", {}, `Question ${number + 1}`), make("div", { class: "text" }, index.questions[number])];
  content.push(make("p", {}, "Answer: ", make("b", {}, index.answers[number] ?? "none given")));
  if (entry.gold !== null) content.push(make("h4", {}, "Human rationale"), rationale(entry.texts[entry.gold], 0));
  for (const [round, samples] of Object.entries(entry.rounds)) {
    const about = index.rounds[round];
    content.push(make("h4", {}, `${about.name}: right ${about.correct[number]} of ${about.samples[number]}`));
    const iteration = Number(/iteration-(\d+)/.exec(about.stage)[1]);
    for (const sample of samples) content.push(sampleOf(entry, sample, about.stage.includes("samples-dpo"), iteration));
  }
  for (const iteration of index.iterations) {
    const pairs = entry.pairs.filter((pair) => pair[0] === iteration);
    if (pairs.length) content.push(make("h4", {}, `Preference pairs of iteration ${iteration}`), ...pairs.map((pair) => pairOf(entry, pair)));
    const labels = entry.labels.filter((label) => label[0] === iteration);
    if (!labels.length) continue;
    content.push(make("h4", {}, `Trained on in iteration ${iteration}: ${labels.length}`));
    for (const [, place, source] of labels) {
      content.push(make("div", { class: "sample" }, badge(source === "gold" ? "" : "blue", source === "gold" ? "human" : "pseudo-label"), rationale(entry.texts[place], 0)));
    }
  }
  return content.concat(legendOfSteps());
}

// Samples that are alike, with what became of their text in this iteration.
function sampleOf(entry, [place, grade, forced, indices], isForPairs, iteration) {
  const badges = [gradeBadge(grade)];
  if (grade >= CUT) badges.push(badge("warn", "cut at the length limit"));
  if (forced === SOME_FORCED) badges.push(badge("", "some results forced"));
  const pairs = entry.pairs.filter((pair) => pair[0] === iteration);
  if (isForPairs && pairs.some((pair) => pair[1] === place)) badges.push(badge("blue", "chosen in a pair"));
  if (isForPairs && pairs.some((pair) => pair[2] === place)) badges.push(badge("blue", "rejected in a pair"));
  if (!isForPairs && entry.labels.some((label) => label[0] === iteration && label[1] === place && label[2] === "sample")) badges.push(badge("blue", "pseudo-label"));
  const which = indices.length > 1 ? `samples ${indices.map((one) => one + 1).join(", ")}` : `sample ${indices[0] + 1}`;
  return make("div", { class: "sample" }, badges, make("span", { class: "soft" }, which), rationale(entry.texts[place], forced));
}

const STEP_NAMES = { [OK]: "", [WRONG]: "wrong", [COPIED]: "copied", [DEPARTS]: "departs" };

function stepTitle(kind, value) {
  if (kind === WRONG) return value === undefined ? "the left side has no value" : `the left side is ${value}`;
  if (kind === COPIED) return "the number that follows is another";
  return kind === DEPARTS ? "no right rationale of this question has this result" : null;
}

// A rationale with its steps marked, and in them what the calculator wrote.
function rationale([text, steps], forced) {
  const characters = Array.from(text); // positions count code points
  const between = (from, to) => characters.slice(from, to).join("");
  const content = make("div", { class: "text" });
  let end = 0;
  for (const [start, result, stop, kind, value] of steps) {
    content.append(shown(between(end, start)));
    const step = make("span", { class: `step ${STEP_NAMES[kind]}`, title: stepTitle(kind, value) }, between(start, result));
    const isForced = forced === ALL_FORCED && kind !== WRONG;
    step.append(isForced ? make("span", { class: "forced" }, between(result, stop)) : shown(between(result, stop)));
    if (kind !== OK) step.append(make("span", { class: "unseen" }, ` (${stepTitle(kind, value)})`)); // for screen readers
    content.append(step);
    if (kind === WRONG && value !== undefined) content.append(badge("bad", `= ${value}`));
    end = stop;
  }
  content.append(shown(between(end, characters.length)));
  return content;
}

function legendOfSteps() {
  const example = (kind, text, meaning) => make("span", {}, make("span", { class: kind }, text), ` ${meaning}`);
  return make("div", { class: "legend" }, example("forced", "24>>", "written by the calculator"), example("step wrong", "<<2+2=5>>", "wrong calculation, or not what follows"), example("step departs", "<<2+3=5>>", "first result that no right rationale of this question has: a hint"));
}

// -- pairs side by side -------------------------------------------------------------------------------------------------

function pairOf(entry, [, chosen, rejected, similarity]) {
  const [left, right] = differences(entry.texts[chosen][0], entry.texts[rejected][0]);
  const side = (name, kind, pieces, tag) => make("div", {}, badge(kind, name), make("div", { class: "text" }, pieces.map(([text, isOwn]) => (isOwn ? make(tag, {}, text) : text))));
  return make("div", {}, make("p", { class: "soft" }, `similarity ${similarity}`), make("div", { class: "pair" }, side("chosen", "good", left, "ins"), side("rejected", "bad", right, "del")));
}

// The words of two texts, as [text, whether the other lacks it], by their longest common subsequence.
function differences(a, b) {
  const words = (text) => (text.match(/\s+|[\p{L}\p{N}.]+|[^\s\p{L}\p{N}.]/gu) ?? []).slice(0, 1500);
  const left = words(a);
  const right = words(b);
  const length = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      length[i][j] = left[i] === right[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const pieces = [[], []];
  const add = (side, text, isOwn) => {
    const last = pieces[side][pieces[side].length - 1];
    if (last && last[1] === isOwn) last[0] += text;
    else pieces[side].push([text, isOwn]);
  };
  let i = 0;
  let j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) {
      add(0, left[i], false);
      add(1, right[j], false);
      i += 1;
      j += 1;
    } else if (j >= right.length || (i < left.length && length[i + 1][j] >= length[i][j + 1])) {
      add(0, left[i], true);
      i += 1;
    } else {
      add(1, right[j], true);
      j += 1;
    }
  }
  return pieces;
}

// -- a question of an evaluation ----------------------------------------------------------------------------------------

function evaluatedQuestion(set, number) {
  const content = [make("h3", {}, `Question ${number + 1} of ${set.name}`)];
  if (set.questions) {
    content.push(make("div", { class: "text" }, set.questions[number]), make("p", {}, "Answer: ", make("b", {}, set.answers[number])));
    if (set.gold?.[number]) content.push(make("h4", {}, "Human rationale"), make("div", { class: "text" }, set.gold[number]));
  } else {
    content.push(make("p", { class: "soft" }, "A run does not keep the questions of its evaluations, and the dataset is not at hand."));
  }
  const rows = set.models.map((model) => {
    const [iteration, kind] = model.name.split("/");
    const name = kind === "dpo" ? `iteration ${iteration}, after DPO` : `iteration ${iteration}, after SFT`;
    const sampled = model.n_correct ? (number < model.n_correct.length ? `${model.n_correct[number]} of ${model.n_samples}` : "–") : "–";
    return [name, model.correct[number] ? "✓ right" : "✗ wrong", sampled];
  });
  content.push(table(["model", "greedy answer", "samples right"], rows));
  const written = set.models.filter((model) => model.completions);
  for (const model of written) {
    const [iteration, kind] = model.name.split("/");
    content.push(make("h4", {}, `Iteration ${iteration}, after ${kind.toUpperCase()}`), make("div", { class: "sample" }, gradeBadge(model.correct[number]), rationale(model.completions[number], 0)));
  }
  if (!written.length) content.push(make("p", { class: "soft" }, "Of evaluations a run keeps whether each answer was right, not its text; eval.py --output and --save-completions do."));
  return content;
}

if (typeof document !== "undefined") start();
