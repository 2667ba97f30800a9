// The settings of the chat: read from their fields, checked, and remembered.

import { byId } from "./dom.js";
import { t } from "./i18n.js";
import { load, save } from "./store.js";

const DEFAULTS = { system: "", temperature: 0.7, top_p: 1, max_tokens: 512, seed: "", stop: "", format: "", schema: "", tools: "" };
const NAMES = Object.keys(DEFAULTS);

export class SettingsError extends Error {}

const field = (name) => byId(`set-${name}`);

export function initSettings() {
  fill({ ...DEFAULTS, ...load("settings", {}) });
  byId("settings").addEventListener("input", () => {
    show();
    save("settings", Object.fromEntries(NAMES.map((name) => [name, field(name).value])));
  });
  byId("reset-settings").addEventListener("click", () => {
    save("settings", {});
    fill(DEFAULTS);
  });
}

function fill(values) {
  for (const name of NAMES) field(name).value = values[name];
  show();
}

function show() {
  for (const name of ["temperature", "top_p"]) document.querySelector(`output[for=set-${name}]`).textContent = Number(field(name).value).toFixed(2);
  byId("row-schema").hidden = field("format").value !== "json_schema";
  for (const name of ["schema", "tools"]) field(name).removeAttribute("aria-invalid");
  byId("settings-error").textContent = "";
}

function json(name, label) {
  const text = field(name).value.trim();
  if (!text) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw refuse(name, t("badJson", t(label), error.message));
  }
}

function refuse(name, message) {
  field(name).setAttribute("aria-invalid", "true");
  byId("settings-error").textContent = message;
  return new SettingsError(message);
}

/** What a request takes from the settings. Throws a SettingsError that is shown already. */
export function requestOptions() {
  const options = {
    model: field("model").value || undefined,
    temperature: Number(field("temperature").value),
    top_p: Number(field("top_p").value),
  };
  if (field("max_tokens").value) options.max_tokens = Number(field("max_tokens").value);
  if (field("seed").value !== "") options.seed = Number(field("seed").value);
  const stop = field("stop").value.split("\n").filter(Boolean);
  if (stop.length) options.stop = stop;
  if (field("format").value === "json_object") options.response_format = { type: "json_object" };
  if (field("format").value === "json_schema") {
    options.response_format = { type: "json_schema", json_schema: { name: "answer", schema: json("schema", "schema") ?? {}, strict: true } };
  }
  const tools = json("tools", "tools");
  if (tools !== undefined) {
    if (!Array.isArray(tools)) throw refuse("tools", t("badJson", t("tools"), t("mustBeList")));
    if (tools.length) options.tools = tools;
  }
  return options;
}

export const systemMessage = () => field("system").value.trim();

/** The names to choose from; keeps the choice where it can. */
export function setModels(names) {
  const select = field("model");
  const before = select.value || load("model", "");
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) select.value = before;
  select.onchange = () => {
    save("model", select.value);
    byId("bar-model").textContent = select.value;
  };
  byId("bar-model").textContent = select.value;
}
