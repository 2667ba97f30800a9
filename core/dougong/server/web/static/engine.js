// The live view: follows /web/live while it is shown, and draws each snapshot.

import { ApiError, events } from "./api.js";
import { blockMap, colour, niceCeiling, sparkline, stackedBars, timeline } from "./canvas.js";
import { byId, element } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";

const SPAN = 60; // seconds of the timeline, once there was so much to show
const FIRST_SPAN = 15;
const KEPT = 150;
const MOST_STEPS = 240;
const RETRY_MS = 1500;
const QUIET_MS = 4000;
const OWNED = 8; // cells from here on are colours of requests; below are states
const STATES = ["free", "cached", "shared", "line", "soft"];

let engine = null;
let frame = null;
let follower = null;
let askKey = () => {};
let steps = [];
let lanes = [];
let lastTable = 0;
let received = 0;
let span = FIRST_SPAN;
const past = {};
const bars = new Map();
const still = matchMedia("(prefers-reduced-motion: reduce)");

export function initEngine({ onKeyNeeded }) {
  askKey = onKeyNeeded;
  document.addEventListener("visibilitychange", () => {
    if (byId("view-engine").hidden) return;
    if (document.hidden) hideEngine();
    else showEngine();
  });
  setInterval(() => {
    if (follower && frame && !byId("live-state").dataset.name && performance.now() - received > QUIET_MS) say("quiet");
  }, 1000);
  new ResizeObserver(() => draw()).observe(byId("view-engine"));
  document.querySelector(".lines details").addEventListener("toggle", () => drawTable(true));
  byId("kv-groups").addEventListener("pointermove", point);
  legends();
  onLanguage(() => {
    legends();
    drawKernels();
    draw();
  });
}

export function showEngine() {
  if (follower) return;
  follower = new AbortController();
  follow(follower);
  requestAnimationFrame(animate);
}

export function hideEngine() {
  follower?.abort();
  follower = null;
}

async function follow(mine) {
  while (!mine.signal.aborted) {
    try {
      for await (const { event, data } of events("web/live", { signal: mine.signal })) {
        const content = JSON.parse(data);
        if (event === "engine") restart(content);
        else if (event === "snapshot") take(content);
        say("");
      }
      say("lost");
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof ApiError && error.status === 401) {
        say("needKey");
        return;
      }
      say("lost");
    }
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

function say(name) {
  const banner = byId("live-state");
  if ((banner.dataset.name ?? "") === name) return;
  banner.dataset.name = name;
  banner.hidden = !name;
  banner.replaceChildren(name ? t(name) : "", ...(name === "needKey" ? [element("button", { onclick: askKey }, t("enterKey"))] : []));
}

function restart(content) {
  engine = content;
  steps = [];
  bars.clear();
  lanes = [];
  drawKernels();
}

// -- taking a snapshot --------------------------------------------------------------------------------------

function take(content) {
  const before = frame;
  frame = content;
  received = performance.now();
  steps = [...steps, ...content.recent].slice(-MOST_STEPS);
  const totals = content.totals;
  const old = before && before.totals.prefix_queries <= totals.prefix_queries ? before.totals : null;
  const queries = totals.prefix_queries - (old?.prefix_queries ?? 0);
  push("tokens", content.tokens_per_s);
  push("running", content.num_running);
  push("waiting", content.num_waiting);
  push("kv", content.kv_usage);
  // Between look-ups the last rate stands.
  push("hits", queries ? (totals.prefix_hits - (old?.prefix_hits ?? 0)) / queries : past.hits?.at(-1) ?? 0);
  push("step", medianStep(40));
  followRequests(content);
  draw();
}

function push(name, value) {
  (past[name] ??= []).push(value);
  if (past[name].length > KEPT) past[name].shift();
}

const total = (step) => step[3] + step[4] + step[5] + step[6];

function medianStep(count) {
  const times = steps.slice(-count).map(total).sort((a, b) => a - b);
  return times.length ? times[Math.floor(times.length / 2)] : 0;
}

function followRequests(content) {
  const seen = new Set();
  for (const request of [...content.running, ...content.waiting]) {
    seen.add(request.id);
    let bar = bars.get(request.id);
    if (!bar) {
      bar = { lane: freeLane(content.time), colour: request.colour, arrival: content.time - request.age_s, end: null };
      lanes[bar.lane] = bar;
      bars.set(request.id, bar);
    }
    bar.start = request.running_s === null ? null : content.time - request.running_s;
    bar.first = request.first_token_s === null ? null : bar.arrival + request.first_token_s;
    bar.label = request.max_tokens ? `${request.prompt_tokens} → ${request.output_tokens} / ${request.max_tokens}` : `${request.prompt_tokens} → ${request.output_tokens}`;
  }
  for (const [id, bar] of bars) {
    if (bar.end === null && !seen.has(id)) bar.end = content.time;
    if (bar.end !== null && bar.end < content.time - SPAN) bars.delete(id);
  }
}

/** The first lane whose last request is over, or out of sight. */
function freeLane(now) {
  for (let lane = 0; lane < lanes.length; lane++) {
    if (lanes[lane].end !== null && lanes[lane].end < now - 0.5) return lane;
  }
  return lanes.length;
}

// -- drawing ------------------------------------------------------------------------------------------------

function draw() {
  if (!frame || byId("view-engine").hidden) return;
  drawFigures();
  drawMap();
  drawSteps();
  drawTimeline();
  drawTable(false);
}

function animate() {
  if (!follower) return;
  if (frame && !still.matches && [...bars.values()].some((bar) => bar.end === null || bar.end > frame.time - SPAN)) drawTimeline();
  requestAnimationFrame(animate);
}

const FIGURES = [
  ["tokens", "tokensPerS", (value) => [number(value, value < 100 ? 1 : 0), ""], 0, "accent"],
  ["running", "running", (value) => [number(value), engine ? `/ ${number(engine.max_num_seqs)}` : ""], 0, "c0"],
  ["waiting", "waiting", (value) => [number(value), ""], 0, "c1"],
  ["kv", "kvUsage", (value) => [number(100 * value, 1), "%"], 1, "c5"],
  ["hits", "hitRate", (value) => [number(100 * value, 0), "%"], 1, "c2"],
  ["step", "stepMedian", (value) => [number(value, value < 10 ? 2 : 1), "ms"], 0, "c3"],
];

function drawFigures() {
  const box = byId("figures");
  if (!box.children.length) {
    box.append(...FIGURES.map(([name]) => element("div.figure", { id: `figure-${name}` }, element("h3"), element("p.value"), element("canvas", { "aria-hidden": "true" }))));
  }
  for (const [name, label, show, most, tint] of FIGURES) {
    const card = byId(`figure-${name}`);
    const [value, unit] = show(past[name]?.at(-1) ?? 0);
    card.querySelector("h3").textContent = t(label);
    card.querySelector(".value").replaceChildren(value, unit ? element("small", {}, unit) : "");
    sparkline(card.querySelector("canvas"), past[name] ?? [], most || niceCeiling(Math.max(...(past[name] ?? [1]))), colour(tint));
  }
}

const tintOf = (cell) => colour(cell < OWNED ? STATES[cell] : `c${cell - OWNED}`);

function drawMap() {
  const box = byId("kv-groups");
  while (box.children.length > frame.groups.length) box.lastChild.remove();
  frame.groups.forEach((group, index) => {
    let view = box.children[index];
    if (!view) {
      view = element("div.group", {}, element("h3"), element("canvas", { role: "img" }));
      box.append(view);
    }
    const usable = group.blocks - group.scratch;
    const words = [frame.groups.length > 1 && t("group", index + 1), group.window && t("window", number(group.window)), group.per_cell > 1 && t("perCell", group.per_cell)];
    const title = view.querySelector("h3");
    title.textContent = words.filter(Boolean).join(" · ");
    title.hidden = !title.textContent;
    const cells = Uint8Array.from(atob(group.cells), (letter) => letter.charCodeAt(0));
    const canvas = view.querySelector("canvas");
    canvas.setAttribute("aria-label", t("kvLabel", number(group.held), number(usable)));
    view.map = { ...blockMap(canvas, cells, tintOf), cells, group };
  });
  const held = frame.groups.reduce((sum, one) => sum + one.held, 0);
  const cached = frame.groups.reduce((sum, one) => sum + one.cached, 0);
  const usable = frame.groups.reduce((sum, one) => sum + one.blocks - one.scratch, 0);
  byId("kv-note").textContent = t("kvNote", number(held), number(usable), number(cached), frame.groups[0]?.block_size ?? "");
}

/** Names the block under the pointer. */
function point(event) {
  const view = event.target.closest("canvas")?.parentElement;
  if (!view?.map?.columns) return;
  const { columns, pitch, cells, group } = view.map;
  const index = Math.floor(event.offsetY / pitch) * columns + Math.min(columns - 1, Math.floor(event.offsetX / pitch));
  if (index >= cells.length) return;
  const cell = cells[index];
  const state = cell >= OWNED ? frame.running.filter((one) => one.colour === cell - OWNED).map((one) => one.id).join(", ") : t(["free", "cachedFree", "shared", "—", "held"][cell]);
  event.target.title = `${index * group.per_cell}: ${state}`;
}

const STEP_PARTS = [["schedule", "c0"], ["launch", "c3"], ["wait", "cached"], ["commit", "shared"]];

function drawSteps() {
  const columns = steps.map((step) => step.slice(3));
  const sorted = steps.map(total).sort((a, b) => a - b);
  // One slow step (a first prompt) must not flatten all others: the top is what 95 of 100 keep.
  const most = niceCeiling((sorted[Math.floor(sorted.length * 0.95)] ?? 1) * 1.05);
  const canvas = byId("step-chart");
  stackedBars(canvas, columns, STEP_PARTS.map(([, tint]) => colour(tint)), most, "ms");
  const median = number(medianStep(MOST_STEPS), 2);
  const sums = columns.reduce((sum, parts) => sum.map((value, index) => value + parts[index]), [0, 0, 0, 0]);
  const all = sums.reduce((a, b) => a + b, 0);
  byId("step-note").textContent = steps.length ? t("stepNote", median, number(all ? (100 * (all - sums[2])) / all : 0)) : "";
  canvas.setAttribute("aria-label", t("stepLabel", median));
}

function drawTimeline() {
  const now = frame.time + Math.min((performance.now() - received) / 1000, 2);
  const shown = [...bars.values()];
  const used = shown.reduce((most, bar) => Math.max(most, bar.lane + 1), 0);
  lanes.length = used;
  const oldest = shown.reduce((first, bar) => Math.min(first, bar.arrival), now);
  span = Math.min(SPAN, Math.max(span, now - oldest + 1));
  timeline(byId("timeline"), shown, Math.min(used, 64), now, span);
  byId("request-note").textContent = shown.length ? t("requestNote", number(frame.num_running), number(frame.num_waiting)) : t("idle");
  byId("timeline").setAttribute("aria-label", t("timeLabel", number(frame.num_running), number(frame.num_waiting)));
}

const COLUMNS = ["id", "state", "prompt", "output", "blocks", "age"];

function drawTable(now) {
  if (!frame || !document.querySelector(".lines details").open) return;
  if (!now && performance.now() - lastTable < 1000) return; // readable, also by a screen reader
  lastTable = performance.now();
  const head = element("thead", {}, element("tr", {}, ...COLUMNS.map((name, index) => element(index > 1 ? "th.number" : "th", { scope: "col" }, t(name)))));
  const rows = [...frame.running, ...frame.waiting].map((one) => element("tr", {},
    element("td", {}, one.id),
    element("td", {}, t(one.running_s === null ? "waitingState" : one.status.includes("preempt") ? "preempted" : "runningState")),
    element("td.number", {}, one.cached_tokens ? `${number(one.prompt_tokens)} (${t("cached", number(one.cached_tokens))})` : number(one.prompt_tokens)),
    element("td.number", {}, one.max_tokens ? t("ofMax", number(one.output_tokens), number(one.max_tokens)) : number(one.output_tokens)),
    element("td.number", {}, number(one.blocks)),
    element("td.number", {}, `${number(one.age_s, 1)} s`),
  ));
  byId("request-table").replaceChildren(head, element("tbody", {}, ...rows));
}

function drawKernels() {
  if (!engine) return;
  byId("kernel-note").textContent = t("kernelNote", engine.backend, engine.device, [engine.dtype, engine.quantization].filter(Boolean).join(", "));
  byId("kernel-list").replaceChildren(...engine.kernels.map((one) => {
    const count = one.refused.length;
    const said = count === 0 ? t("refusedNone") : count === 1 ? t("refusedOne") : t("refused", count);
    const row = [element("code", {}, one.op), element("span.provider", { title: one.plugin }, one.provider), element("span.count", {}, said)];
    if (!count) return element("div.kernel", {}, element("div.plain", {}, ...row));
    return element("details.kernel", {}, element("summary", {}, ...row),
      element("dl", {}, ...one.refused.flatMap((other) => [element("dt", {}, other.provider), element("dd", {}, other.reason)])));
  }));
}

function legends() {
  const items = (pairs) => pairs.map(([kind, name]) => element("li", {}, element(`i.${kind}`), t(name)));
  byId("kv-legend").replaceChildren(...items([["many", "held"], ["shared", "shared"], ["cached", "cachedFree"], ["free", "free"]]));
  byId("step-legend").replaceChildren(...items([["schedule", "schedule"], ["launch", "launch"], ["wait", "wait"], ["commit", "commit"]]));
  byId("time-legend").replaceChildren(...items([["queue", "queue"], ["prefill", "prefill"], ["decode", "decode"]]));
}
