// One turn of a conversation as elements.

import { copy, element } from "./dom.js";
import { number, t } from "./i18n.js";
import { renderMarkdown } from "./markdown.js";

const LABELS = { user: "you", assistant: "answer", tool: "toolAnswer" };

/** The view of a turn; `update()` follows a turn that grows. `acts`: again(index), edit(index), results(index, texts). */
export class TurnView {
  constructor(turn, index, acts) {
    this.turn = turn;
    this.index = index;
    this.acts = acts;
    this.node = element(`article.turn.${turn.role}`, { "aria-label": t(LABELS[turn.role]) });
    if (turn.role === "user") this.#user();
    else if (turn.role === "assistant") this.#assistant();
    else this.node.append(element("details.call", {}, element("summary", {}, t("toolAnswer")), element("pre", {}, turn.content)));
  }

  #user() {
    const copying = element("button", { type: "button", onclick: () => copy(this.turn.content, copying, t("copied")) }, t("copy"));
    this.node.append(
      element("div.body", {}, this.turn.content),
      element("div.meta", {}, element("span.acts", {}, element("button", { type: "button", onclick: () => this.acts.edit(this.index) }, t("edit")), copying)),
    );
  }

  #assistant() {
    this.thought = element("details.thought", { hidden: true }, element("summary", {}, t("thinking")));
    this.thoughtText = element("div.md");
    this.thought.append(this.thoughtText);
    this.text = element("div.md.body");
    this.calls = element("div");
    this.fault = element("p.fault", { hidden: true, role: "alert" });
    this.wait = element("span.waiting", { "aria-hidden": "true" }, element("i"), element("i"), element("i"));
    this.meta = element("div.meta");
    this.node.append(this.thought, this.text, this.wait, this.calls, this.fault, this.meta);
    this.update();
  }

  update() {
    const turn = this.turn;
    const empty = !turn.content && !turn.reasoning && !turn.tool_calls?.length;
    this.wait.hidden = !turn.live || !empty;
    this.thought.hidden = !turn.reasoning;
    if (turn.reasoning) {
      renderMarkdown(this.thoughtText, turn.reasoning);
      if (turn.live) this.thought.open = !turn.content;
    }
    renderMarkdown(this.text, turn.content);
    this.text.classList.toggle("caret", Boolean(turn.live && !empty && turn.content));
    this.#updateCalls();
    this.fault.hidden = !turn.error;
    this.fault.textContent = turn.error ?? "";
    if (!turn.live) this.#finish();
  }

  #updateCalls() {
    const calls = this.turn.tool_calls ?? [];
    calls.forEach((call, index) => {
      let card = this.calls.children[index];
      if (!card) {
        card = element("details.call", { open: true }, element("summary", {}, element("code", {}, "")), element("pre"));
        this.calls.append(card);
      }
      card.querySelector("summary code").textContent = call.name;
      card.querySelector("pre").textContent = pretty(call.arguments);
    });
    const open = calls.length && !this.turn.live && !this.turn.answered;
    if (open && !this.answers) {
      this.answers = calls.map((call) => element("textarea.code", { rows: 2, ariaLabel: t("toolResult", call.name), placeholder: t("toolResult", call.name) }));
      const send = element("button.primary", { type: "button", onclick: () => this.acts.results(this.index, this.answers.map((area) => area.value)) }, t("giveResults"));
      this.calls.append(element("div.call", {}, element("div.answer", {}, element("span"), ...this.answers, send)));
    }
  }

  #finish() {
    const turn = this.turn;
    const figures = turn.figures ?? {};
    const parts = [];
    if (figures.completion_tokens) parts.push(t("tokens", number(figures.completion_tokens)));
    if (figures.cached_tokens) parts.push(t("cached", number(figures.cached_tokens)));
    if (figures.first_ms !== undefined) parts.push(t("firstToken", number(figures.first_ms)));
    if (figures.tokens_per_s) parts.push(t("perSecond", number(figures.tokens_per_s, 1)));
    if (turn.finish === "length") parts.push(t("endedLength"));
    if (turn.stopped) parts.push(t("endedStop"));
    const copying = element("button", { type: "button", onclick: () => copy(turn.content, copying, t("copied")) }, t("copy"));
    const raw = element("button", { type: "button", "aria-expanded": "false", onclick: () => this.#raw(raw) }, t("raw"));
    this.meta.replaceChildren(
      element("span.acts", {}, turn.content && copying, element("button", { type: "button", onclick: () => this.acts.again(this.index) }, t("again")), turn.raw && raw),
      ...parts.map((part) => element("span", {}, part)),
    );
  }

  #raw(button) {
    const shown = this.node.querySelector(".raw-pair");
    button.setAttribute("aria-expanded", String(!shown));
    if (shown) {
      shown.remove();
      return;
    }
    const card = (name, value) => element("details.raw", { open: true }, element("summary", {}, t(name)), element("pre", { tabIndex: 0 }, JSON.stringify(value, null, 2)));
    this.node.append(element("div.raw-pair", {}, card("request", this.turn.raw.request), card("response", this.turn.raw.response)));
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // it still grows
  }
}
