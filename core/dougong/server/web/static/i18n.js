// The page's words in English and Chinese. Markup names a word with data-i18n, data-i18n-label or data-i18n-placeholder.

const WORDS = {
  en: {
    skip: "Skip to content", views: "Views", chat: "Chat", engine: "Engine", apiKey: "API key", otherLanguage: "切换到中文",
    theme: "Theme: {0}", auto: "as the system", light: "light", dark: "dark",
    conversations: "Conversations", conversation: "Conversation", newChat: "New chat", historyNote: "Kept in this browser only.",
    clearHistory: "Delete all", clearSure: "Delete all conversations kept in this browser?", drop: "Delete “{0}”", untitled: "New chat",
    settings: "Settings", messages: "Messages", toEnd: "Go to the end", message: "Message", ask: "Ask anything", send: "Send", stop: "Stop",
    hint: "Enter sends, Shift+Enter makes a new line, Esc stops.", model: "Model", system: "System message", temperature: "Temperature",
    maxTokens: "Longest answer", seed: "Seed", stopStrings: "Stop strings, one a line", format: "Answer's form", formatFree: "Free",
    formatObject: "Any JSON object", formatSchema: "A JSON schema", schema: "JSON schema", tools: "Tools (JSON)", reset: "Reset",
    keyNote: "Sent to this server only. Leave it empty if the server asks for none.", keyKeep: "Remember in this browser",
    cancel: "Cancel", save: "Save", welcome: "What shall we build?", start1: "Explain how a dougong bracket carries a roof",
    start2: "Write a haiku about caching", start3: "Give me a table of three trees and their heights",
    you: "You", answer: "Answer", copy: "Copy", copied: "Copied", again: "Again", edit: "Edit", raw: "JSON", thinking: "Thinking",
    answering: "Answering…", answered: "The answer is complete.", stopped: "Stopped.", tokens: "{0} tokens", cached: "{0} cached",
    firstToken: "first after {0} ms", perSecond: "{0} tokens/s", endedLength: "ended at the longest answer", endedStop: "stopped by you",
    toolResult: "The tool's result for {0}", toolAnswer: "Result of the tool", giveResults: "Send results", badJson: "{0}: {1}", mustBeList: "must be a JSON list of tools",
    connection: "The server cannot be reached. Is it still running?", request: "Request", response: "Response",
    figures: "Figures", tokensPerS: "Tokens per second", running: "Running", waiting: "Waiting", kvUsage: "KV blocks in use",
    hitRate: "Prefix hits", stepMedian: "Step, median", kvMap: "KV blocks", stepTime: "Time of a step", requests: "Requests, last minute",
    kernels: "Kernels", asTable: "As a table", kvNote: "{0} of {1} held, {2} cached for reuse · {3} tokens a block",
    window: "window of {0} tokens", group: "Group {0}", perCell: "{0} blocks a cell", free: "free", cachedFree: "cached, free to reuse",
    held: "held by one request each", shared: "shared by several", schedule: "schedule", launch: "launch", wait: "wait for the device",
    commit: "commit", queue: "in the queue", prefill: "prefill", decode: "decode", stepNote: "{0} ms median · host's share {1}%",
    requestNote: "{0} running, {1} waiting", idle: "No request in the last minute. Ask something in the chat.",
    kernelNote: "{0} on {1} · {2}", refusedNone: "the only one", refusedOne: "1 refused", refused: "{0} refused",
    id: "Request", state: "State", prompt: "Prompt", output: "Output", blocks: "Blocks", age: "Age", ofMax: "{0} of {1}",
    lost: "The server does not answer. Trying again…", quiet: "No news from the engine: a long step, or it is being restarted.", needKey: "This server asks for an API key.", enterKey: "Enter it",
    kvLabel: "Map of KV blocks: {0} of {1} held.", timeLabel: "Timeline: {0} running and {1} waiting requests.",
    stepLabel: "Time of the last steps, median {0} ms.", waitingState: "waiting", runningState: "running", preempted: "preempted",

  },
  zh: {
    skip: "跳到内容", views: "视图", chat: "对话", engine: "引擎", apiKey: "API 密钥", otherLanguage: "Switch to English",
    theme: "主题：{0}", auto: "跟随系统", light: "浅色", dark: "深色",
    conversations: "会话", conversation: "会话内容", newChat: "新对话", historyNote: "只保存在本浏览器中。",
    clearHistory: "全部删除", clearSure: "删除本浏览器中保存的所有会话？", drop: "删除“{0}”", untitled: "新对话",
    settings: "设置", messages: "消息", toEnd: "回到底部", message: "消息", ask: "想问什么都可以", send: "发送", stop: "停止",
    hint: "Enter 发送，Shift+Enter 换行，Esc 停止。", model: "模型", system: "系统消息", temperature: "温度",
    maxTokens: "最长回答", seed: "随机种子", stopStrings: "停止字符串，每行一个", format: "回答格式", formatFree: "自由",
    formatObject: "任意 JSON 对象", formatSchema: "JSON Schema", schema: "JSON Schema", tools: "工具（JSON）", reset: "恢复默认",
    keyNote: "只发送给本服务器。服务器不要求密钥时请留空。", keyKeep: "在本浏览器中记住",
    cancel: "取消", save: "保存", welcome: "今天想建点什么？", start1: "解释斗拱如何承托屋顶",
    start2: "写一首关于缓存的俳句", start3: "用表格列出三种树和它们的高度",
    you: "你", answer: "回答", copy: "复制", copied: "已复制", again: "重答", edit: "修改", raw: "JSON", thinking: "思考过程",
    answering: "正在回答……", answered: "回答完毕。", stopped: "已停止。", tokens: "{0} 个词元", cached: "{0} 个来自缓存",
    firstToken: "首词元 {0} 毫秒", perSecond: "每秒 {0} 词元", endedLength: "达到最长回答", endedStop: "已由你停止",
    toolResult: "{0} 的工具结果", toolAnswer: "工具的结果", giveResults: "发送结果", badJson: "{0}：{1}", mustBeList: "必须是 JSON 工具列表",
    connection: "无法连接服务器，它还在运行吗？", request: "请求", response: "响应",
    figures: "指标", tokensPerS: "每秒词元", running: "运行中", waiting: "等待中", kvUsage: "KV 块占用",
    hitRate: "前缀命中", stepMedian: "步时中位数", kvMap: "KV 块", stepTime: "每步耗时", requests: "最近一分钟的请求",
    kernels: "算子", asTable: "以表格显示", kvNote: "共 {1} 块，占用 {0}，缓存可复用 {2} · 每块 {3} 词元",
    window: "窗口 {0} 词元", group: "第 {0} 组", perCell: "每格 {0} 块", free: "空闲", cachedFree: "已缓存，可复用",
    held: "由单个请求占用", shared: "多个请求共享", schedule: "调度", launch: "启动", wait: "等待设备",
    commit: "提交", queue: "排队", prefill: "预填充", decode: "解码", stepNote: "中位数 {0} 毫秒 · 主机占比 {1}%",
    requestNote: "{0} 个运行，{1} 个等待", idle: "最近一分钟没有请求。去对话里问点什么吧。",
    kernelNote: "{0} · {1} · {2}", refusedNone: "唯一候选", refusedOne: "1 个被拒", refused: "{0} 个被拒",
    id: "请求", state: "状态", prompt: "提示", output: "输出", blocks: "块", age: "时长", ofMax: "{0} / {1}",
    lost: "服务器没有应答，正在重试……", quiet: "引擎暂无消息：可能正在执行较长的一步，或正在重启。", needKey: "此服务器需要 API 密钥。", enterKey: "输入密钥",
    kvLabel: "KV 块图：共 {1} 块，占用 {0} 块。", timeLabel: "时间线：{0} 个运行、{1} 个等待的请求。",
    stepLabel: "最近各步耗时，中位数 {0} 毫秒。", waitingState: "等待", runningState: "运行", preempted: "被抢占",

  },
};

let language = "en";
const listeners = [];

/** The word in the page's language; {0}, {1} … are filled in. */
export function t(name, ...values) {
  const text = WORDS[language][name] ?? WORDS.en[name] ?? name;
  return text.replace(/\{(\d)\}/g, (_, index) => String(values[Number(index)] ?? ""));
}

export const currentLanguage = () => language;

/** Calls back after each change of language. */
export function onLanguage(listener) { listeners.push(listener); }

export function setLanguage(name) {
  language = name in WORDS ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = t(node.dataset.i18n);
  for (const node of document.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
    if (node.matches("button")) node.title = t(node.dataset.i18nLabel);
  }
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) node.placeholder = t(node.dataset.i18nPlaceholder);
  for (const listener of listeners) listener();
}

/** A number with the language's separators. */
export function number(value, digits = 0) {
  return value.toLocaleString(language === "zh" ? "zh-CN" : "en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
