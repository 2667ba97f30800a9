// Talking with the server that this page came from; paths are relative, so that a proxy may serve it below a path.

import { apiKey } from "./store.js";
import { t } from "./i18n.js";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, t("connection"));
  }
  if (!response.ok) throw new ApiError(response.status, await failure(response));
  return response;
}

async function failure(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    return body.error?.message ?? body.detail ?? body.message ?? text;
  } catch {
    return text || `HTTP ${response.status}`;
  }
}

export async function models() {
  const response = await request("v1/models");
  return (await response.json()).data;
}

/** Server-sent events of a response: {event, data} each, data as text. */
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r\n", "\n");
      let end;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const found = { event: "message", data: "" };
        for (const line of rest.slice(0, end).split("\n")) {
          if (line.startsWith("event:")) found.event = line.slice(6).trim();
          else if (line.startsWith("data:")) found.data += (found.data ? "\n" : "") + line.slice(5).trimStart();
        }
        rest = rest.slice(end + 2);
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of a streamed chat completion. */
export async function* chat(body, signal) {
  const options = { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for await (const { data } of events("v1/chat/completions", options)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code ?? 500, chunk.error.message);
    yield chunk;
  }
}
