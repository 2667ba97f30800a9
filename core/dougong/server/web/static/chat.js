// The chat playground: conversations kept in this browser, answers streamed from /v1/chat/completions.

import { ApiError, chat, models } from "./api.js";
import { byId, element } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { initSettings, requestOptions, setModels, SettingsError, systemMessage } from "./settings.js";
import { load, save } from "./store.js";
import { TurnView } from "./turns.js";

const MOST_CONVERSATIONS = 50;
const LONGEST_SPOKEN = 1000;

let conversations = load("conversations", []);
let current = null;
let views = [];
let running = null;
let askKey = () => {};

export function initChat({ onKeyNeeded }) {
  askKey = onKeyNeeded;
  initSettings();
  const prompt = byId("prompt");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    // While an input method composes (Chinese), Enter belongs to it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      submit();
    }
  });
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
    if (event.key === "/" && !event.target.closest?.("input, textarea, select") && !byId("view-chat").hidden) {
      event.preventDefault();
      prompt.focus();
    }
  });
  byId("new-chat").addEventListener("click", () => open(null));
  byId("clear-history").addEventListener("click", () => {
    if (!conversations.length || !confirm(t("clearSure"))) return;
    conversations = [];
    keep();
    open(null);
  });
  drawer("toggle-history", "history");
  drawer("toggle-settings", "settings");
  const messages = byId("messages");
  messages.addEventListener("scroll", () => { byId("jump").hidden = atEnd() || !current; }, { passive: true });
  byId("jump").addEventListener("click", () => messages.scrollTo({ top: messages.scrollHeight }));
  onLanguage(() => { if (!running) show(); listHistory(); });
  loadModels();
  open(null);
}

export async function loadModels() {
  try {
    setModels((await models()).map((one) => one.id));
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askKey();
  }
}

function drawer(buttonId, panelId) {
  const button = byId(buttonId);
  const panel = byId(panelId);
  const set = (isOpen) => {
    panel.classList.toggle("open", isOpen);
    button.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) panel.querySelector("button, input, select, textarea").focus();
  };
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    set(!panel.classList.contains("open"));
  });
  document.addEventListener("click", (event) => {
    if (panel.classList.contains("open") && !panel.contains(event.target)) set(false);
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && panel.classList.contains("open")) {
      set(false);
      button.focus();
    }
  });
}

// -- conversations ------------------------------------------------------------------------------------------

function keep() {
  conversations = conversations.slice(0, MOST_CONVERSATIONS);
  const plain = conversations.map((one) => ({ ...one, turns: one.turns.map(({ raw, live, ...turn }) => turn) }));
  // A full storage gives up the oldest first.
  while (!save("conversations", plain) && plain.length > 1) plain.pop();
  listHistory();
}

function listHistory() {
  byId("history-list").replaceChildren(...conversations.map((one) => element(one === current ? "li.now" : "li", {},
    element("button.open", { type: "button", title: one.title, "aria-current": one === current ? "true" : null, onclick: () => open(one) }, one.title),
    element("button.drop", { type: "button", ariaLabel: t("drop", one.title), onclick: () => drop(one) }, "×"),
  )));
}

function drop(one) {
  conversations = conversations.filter((other) => other !== one);
  if (one === current) open(null);
  keep();
}

function open(conversation) {
  stop();
  current = conversation;
  byId("history").classList.remove("open");
  byId("toggle-history").setAttribute("aria-expanded", "false");
  show();
  listHistory();
  if (matchMedia("(hover: hover)").matches) byId("prompt").focus();
}

function show() {
  const messages = byId("messages");
  if (!current) {
    messages.replaceChildren(welcome());
    views = [];
    return;
  }
  views = current.turns.map((turn, index) => new TurnView(turn, index, { again, edit, results }));
  messages.replaceChildren(...views.map((view) => view.node));
  messages.scrollTop = messages.scrollHeight;
}

function welcome() {
  const mark = document.querySelector(".bar .mark").cloneNode(true);
  const starts = ["start1", "start2", "start3"].map((name) => element("button", { type: "button", onclick: () => { byId("prompt").value = t(name); submit(); } }, t(name)));
  return element("div.welcome", {}, mark, element("h2", {}, t("welcome")), element("div.starts", {}, ...starts));
}

// -- asking -------------------------------------------------------------------------------------------------

function submit() {
  const prompt = byId("prompt");
  const text = prompt.value.trim();
  if (!text || running) return;
  if (!checked()) return;
  if (!current) {
    current = { id: crypto.randomUUID?.() ?? String(Date.now()), title: text.slice(0, 60), turns: [] };
    conversations.unshift(current);
  }
  current.turns.push({ role: "user", content: text });
  prompt.value = "";
  grow();
  answer();
}

/** The settings' options, or null after showing what is wrong with them. */
function checked() {
  try {
    return requestOptions();
  } catch (error) {
    if (!(error instanceof SettingsError)) throw error;
    if (getComputedStyle(byId("settings")).display === "none") byId("toggle-settings").click();
    document.querySelector("[aria-invalid=true]").focus();
    return null;
  }
}

function again(index) {
  if (running || !checked()) return;
  current.turns.length = index;
  answer();
}

function edit(index) {
  if (running) return;
  const prompt = byId("prompt");
  prompt.value = current.turns[index].content;
  current.turns.length = index;
  show();
  grow();
  prompt.focus();
}

function results(index, texts) {
  if (running) return;
  const turn = current.turns[index];
  turn.answered = true;
  turn.tool_calls.forEach((call, i) => current.turns.push({ role: "tool", tool_call_id: call.id, content: texts[i] }));
  answer();
}

function messagesOf(turns) {
  const system = systemMessage();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    if (turn.role === "tool") messages.push({ role: "tool", tool_call_id: turn.tool_call_id, content: turn.content });
    else if (turn.role === "user") messages.push({ role: "user", content: turn.content });
    else if (turn.content || turn.tool_calls?.length) {
      const message = { role: "assistant", content: turn.content || null };
      if (turn.tool_calls?.length) {
        message.tool_calls = turn.tool_calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
      }
      messages.push(message);
    }
  }
  return messages;
}

async function answer() {
  const options = checked();
  if (!options) return;
  const conversation = current;
  const body = { ...options, messages: messagesOf(conversation.turns), stream: true, stream_options: { include_usage: true } };
  const turn = { role: "assistant", content: "", live: true, raw: { request: body, response: [] } };
  conversation.turns.push(turn);
  conversations = [conversation, ...conversations.filter((one) => one !== conversation)];
  show();
  keep();
  const view = views[views.length - 1];
  const controller = new AbortController();
  running = controller;
  busy(true);
  byId("status").textContent = t("answering");
  const started = performance.now();
  let first = null;
  let last = null;
  let frame = 0;
  const draw = () => {
    frame = 0;
    const stay = atEnd();
    view.update();
    if (stay) byId("messages").scrollTop = byId("messages").scrollHeight;
  };
  try {
    for await (const chunk of chat(body, controller.signal)) {
      turn.raw.response.push(chunk);
      if (take(turn, chunk)) {
        last = performance.now();
        first ??= last;
      }
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else {
      turn.error = error.message;
      if (error.status === 401) askKey();
    }
  }
  cancelAnimationFrame(frame);
  turn.live = false;
  const made = turn.figures?.completion_tokens;
  turn.figures = { ...turn.figures, ...(first !== null && { first_ms: Math.round(first - started) }) };
  if (made > 1 && last > first) turn.figures.tokens_per_s = (made - 1) / ((last - first) / 1000);
  if (running === controller) {
    running = null;
    busy(false);
  }
  draw();
  keep();
  byId("status").textContent = turn.error ?? `${t(turn.stopped ? "stopped" : "answered")} ${turn.content.slice(0, LONGEST_SPOKEN)}`;
}

/** Adds a chunk to the turn; whether it brought something of the answer. */
function take(turn, chunk) {
  if (chunk.usage) {
    turn.figures = { completion_tokens: chunk.usage.completion_tokens, cached_tokens: chunk.usage.prompt_tokens_details?.cached_tokens ?? 0 };
  }
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) turn.finish = choice.finish_reason;
  const delta = choice.delta ?? {};
  const thought = delta.reasoning_content ?? delta.reasoning;
  if (thought) turn.reasoning = (turn.reasoning ?? "") + thought;
  if (delta.content) turn.content += delta.content;
  for (const piece of delta.tool_calls ?? []) {
    turn.tool_calls ??= [];
    const call = (turn.tool_calls[piece.index] ??= { id: "", name: "", arguments: "" });
    if (piece.id) call.id = piece.id;
    if (piece.function?.name) call.name = piece.function.name;
    call.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(thought || delta.content || delta.tool_calls?.length);
}

function stop() {
  running?.abort();
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("messages").setAttribute("aria-busy", String(is));
}

// -- small things -------------------------------------------------------------------------------------------

function atEnd() {
  const messages = byId("messages");
  return messages.scrollHeight - messages.scrollTop - messages.clientHeight < 90;
}

function grow() {
  const prompt = byId("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}
