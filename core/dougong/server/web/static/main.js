// The frame around both views: tabs, theme, language, key.

import { initChat, loadModels } from "./chat.js";
import { byId } from "./dom.js";
import { hideEngine, initEngine, showEngine } from "./engine.js";
import { forgetColours } from "./canvas.js";
import { currentLanguage, onLanguage, setLanguage, t } from "./i18n.js";
import { apiKey, keepsApiKey, load, save, setApiKey } from "./store.js";

const THEMES = ["auto", "light", "dark"];
const VIEWS = ["chat", "engine"];

let theme = load("theme", "auto");

function applyTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", t("theme", t(theme)));
  byId("theme").title = t("theme", t(theme));
  forgetColours();
}

function select(view, focus = false) {
  for (const name of VIEWS) {
    const tab = byId(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === view));
    tab.tabIndex = name === view ? 0 : -1;
    byId(`view-${name}`).hidden = name !== view;
    if (focus && name === view) tab.focus();
  }
  document.querySelector(".skip").href = `#view-${view}`;
  if (view === "engine") showEngine();
  else hideEngine();
}

function initTabs() {
  for (const name of VIEWS) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => { location.hash = name === "chat" ? "" : name; });
    tab.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      const index = event.key === "Home" ? 0 : event.key === "End" ? VIEWS.length - 1 : (VIEWS.indexOf(name) + 1) % VIEWS.length;
      location.hash = VIEWS[index] === "chat" ? "" : VIEWS[index];
      byId(`tab-${VIEWS[index]}`).focus();
    });
  }
  const follow = () => select(location.hash === "#engine" ? "engine" : "chat");
  addEventListener("hashchange", follow);
  follow();
}

function openKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key").value = apiKey();
  byId("key-keep").checked = keepsApiKey();
  dialog.returnValue = "";
  dialog.showModal();
}

byId("key-dialog").addEventListener("close", () => {
  if (byId("key-dialog").returnValue === "ok") {
    setApiKey(byId("key").value.trim(), byId("key-keep").checked);
    loadModels();
    if (!byId("view-engine").hidden) {
      hideEngine();
      showEngine();
    }
  }
  byId("key").value = "";
  byId("open-key").classList.toggle("on", Boolean(apiKey()));
});
// The form's first button would be pressed by Enter: it cancels.
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  byId("key-dialog").close("ok");
});

byId("open-key").addEventListener("click", openKey);
byId("open-key").classList.toggle("on", Boolean(apiKey()));
byId("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  save("theme", theme);
  applyTheme();
});
byId("language").addEventListener("click", () => {
  save("language", currentLanguage() === "en" ? "zh" : "en");
  setLanguage(load("language", "en"));
});
onLanguage(() => {
  byId("language").textContent = currentLanguage() === "en" ? "中" : "EN";
  applyTheme();
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", forgetColours);
setLanguage(load("language", navigator.language.startsWith("zh") ? "zh" : "en"));
initChat({ onKeyNeeded: openKey });
initEngine({ onKeyNeeded: openKey });
initTabs();
