// What this browser remembers. Storage may be missing or full (private windows): then it lasts as long as the page.

const PREFIX = "dougong.";
const memory = new Map();

export function load(name, fallback) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? memory.get(name) ?? fallback : JSON.parse(text);
  } catch {
    return memory.get(name) ?? fallback;
  }
}

/** False if it did not fit. */
export function save(name, value) {
  memory.set(name, value);
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

let key = "";

/** The API key: for this tab, or in this browser if the user said so. */
export function apiKey() {
  if (key) return key;
  try {
    key = sessionStorage.getItem(PREFIX + "key") ?? localStorage.getItem(PREFIX + "key") ?? "";
  } catch {
    key = "";
  }
  return key;
}

export function keepsApiKey() {
  try {
    return localStorage.getItem(PREFIX + "key") !== null;
  } catch {
    return false;
  }
}

export function setApiKey(value, keep) {
  key = value;
  try {
    sessionStorage.removeItem(PREFIX + "key");
    localStorage.removeItem(PREFIX + "key");
    if (value) (keep ? localStorage : sessionStorage).setItem(PREFIX + "key", value);
  } catch { /* it lasts as long as the page */ }
}
