// Markdown into elements. Text stays text: no HTML of a model is ever parsed, no image of the outside is ever loaded, and
// only http, https and mailto become links.

import { copy, element } from "./dom.js";
import { t } from "./i18n.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const BULLET = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Brings `container` up to date with `text`; blocks that did not change keep their elements, and so a selection. */
export function renderMarkdown(container, text) {
  const blocks = split(text);
  blocks.forEach((raw, index) => {
    const old = container.children[index];
    if (old && old.raw === raw) return;
    const block = element("div", {}, ...blockNodes(raw.split("\n")));
    block.raw = raw;
    if (old) old.replaceWith(block);
    else container.append(block);
  });
  while (container.children.length > blocks.length) container.lastChild.remove();
}

/** Top-level blocks: at blank lines, but not within fences, nor between the items of a list. */
function split(text) {
  const blocks = [];
  let now = [];
  let fence = null;
  for (const line of text.split("\n")) {
    const mark = line.match(FENCE);
    if (fence) {
      now.push(line);
      if (mark && !mark[2] && mark[1][0] === fence[0] && mark[1].length >= fence.length) fence = null;
      continue;
    }
    if (mark) fence = mark[1];
    const last = blocks.length ? blocks[blocks.length - 1].split("\n", 1)[0] : "";
    if (line.trim() === "") {
      if (now.length) blocks.push(now.join("\n"));
      now = [];
    } else if (!now.length && BULLET.test(last) && (BULLET.test(line) || /^\s{2,}/.test(line))) {
      now = (blocks.pop() + "\n").split("\n");
      now.push(line);
    } else {
      now.push(line);
    }
  }
  if (now.length) blocks.push(now.join("\n"));
  return blocks;
}

function blockNodes(lines) {
  const nodes = [];
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) nodes.push(element("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(FENCE);
    const heading = line.match(HEADING);
    if (fence) {
      flush();
      const body = [];
      const closing = new RegExp(`^ {0,3}${fence[1][0] === "~" ? "~" : "`"}{${fence[1].length},}\\s*$`);
      for (i++; i < lines.length && !closing.test(lines[i]); i++) body.push(lines[i]);
      nodes.push(codeBlock(body.join("\n"), fence[2]));
    } else if (heading) {
      flush();
      nodes.push(element(`h${heading[1].length > 4 ? 4 : heading[1].length}`, {}, ...inline(heading[2])));
    } else if (RULE.test(line)) {
      flush();
      nodes.push(element("hr"));
    } else if (/^\s{0,3}>/.test(line)) {
      flush();
      const body = [];
      for (; i < lines.length && /^\s{0,3}>/.test(lines[i]); i++) body.push(lines[i].replace(/^\s{0,3}>\s?/, ""));
      i--;
      nodes.push(element("blockquote", {}, ...blockNodes(body)));
    } else if (BULLET.test(line) && (!paragraph.length || !/^\s*\d/.test(line))) {
      flush();
      const body = [];
      for (; i < lines.length && (BULLET.test(lines[i]) || /^\s+\S/.test(lines[i]) || lines[i].trim() === ""); i++) body.push(lines[i]);
      i--;
      nodes.push(list(body));
    } else if (line.includes("|") && TABLE_LINE.test(lines[i + 1] ?? "") && (lines[i + 1] ?? "").includes("-")) {
      flush();
      const body = [line];
      for (i += 2; i < lines.length && lines[i].includes("|"); i++) body.push(lines[i]);
      i--;
      nodes.push(table(body));
    } else if (line.trim() === "") {
      flush();
    } else {
      paragraph.push(line);
    }
  }
  flush();
  return nodes;
}

function codeBlock(text, language) {
  const button = element("button", { type: "button", onclick: () => copy(text, button, t("copied")) }, t("copy"));
  return element("div.fence", {}, element("header", {}, element("span", {}, language), button),
    element("pre", { tabIndex: 0 }, element("code", {}, text)));
}

function list(lines) {
  const [, indent, mark] = lines[0].match(BULLET);
  const node = element(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark) && parseInt(mark, 10) !== 1) node.start = parseInt(mark, 10);
  let item = null;
  const close = () => {
    if (!item) return;
    const nodes = blockNodes(item);
    // One paragraph alone is set without a paragraph's distances.
    node.append(element("li", {}, ...nodes.flatMap((one, index) => (index === 0 && one.tagName === "P" ? [...one.childNodes] : [one]))));
  };
  for (const line of lines) {
    const found = line.match(BULLET);
    if (found && found[1].length <= indent.length + 1) {
      close();
      item = [found[3]];
    } else {
      item.push(line.replace(/^\s{1,4}/, ""));
    }
  }
  close();
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const row = (line, kind) => element("tr", {}, ...cells(line).map((cell) => element(kind, {}, ...inline(cell))));
  return element("div.grid", { tabIndex: 0 }, element("table", {}, element("thead", {}, row(lines[0], "th")),
    element("tbody", {}, ...lines.slice(1).map((line) => row(line, "td")))));
}

// The first that matches at a place wins; each has its own groups.
const INLINE = new RegExp([
  "(?<code>(?<ticks>`+)(?<codeText>[\\s\\S]*?[^`])\\k<ticks>(?!`))",
  "(?<escape>\\\\[\\\\`*_{}\\[\\]()#+\\-.!~|>])",
  "(?<link>!?\\[(?<linkText>[^\\]\\n]*)\\]\\((?<linkTarget>[^()\\s]*(?:\\([^()\\s]*\\)[^()\\s]*)*)(?:\\s+\"[^\"]*\")?\\))",
  "(?<auto>https?://[^\\s<>\"'`]*[^\\s<>\"'`.,;:!?)\\]}*_])",
  "(?<strong>\\*\\*(?=\\S)(?<strongText>[\\s\\S]*?\\S)\\*\\*|__(?=\\S)(?<strongText2>[\\s\\S]*?\\S)__(?!\\w))",
  "(?<em>\\*(?=[^\\s*])(?<emText>[^*]*?[^\\s*])\\*|(?<!\\w)_(?=[^\\s_])(?<emText2>[^_]*?[^\\s_])_(?!\\w))",
  "(?<strike>~~(?=\\S)(?<strikeText>[\\s\\S]*?\\S)~~)",
  "(?<newline> {2,}\\n|\\n)",
].join("|"), "g");

function inline(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) nodes.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    const g = match.groups;
    if (g.code) nodes.push(element("code", {}, g.codeText.replace(/^ (.*) $/s, "$1")));
    else if (g.escape) nodes.push(g.escape[1]);
    else if (g.link) nodes.push(link(g.linkTarget, g.linkText ? inline(g.linkText) : [g.linkTarget], match[0]));
    else if (g.auto) nodes.push(link(g.auto, [g.auto], g.auto));
    else if (g.strong) nodes.push(element("strong", {}, ...inline(g.strongText ?? g.strongText2)));
    else if (g.em) nodes.push(element("em", {}, ...inline(g.emText ?? g.emText2)));
    else if (g.strike) nodes.push(element("del", {}, ...inline(g.strikeText)));
    else nodes.push(match[0].length > 1 ? element("br") : "\n");
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function link(target, nodes, raw) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return raw;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return raw;
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);
}
