"use strict";
const server = JSON.parse(document.getElementById("server").textContent);
const element = (id) => document.getElementById(id);
const number = (id) => (element(id) && element(id).value !== "" ? Number(element(id).value) : undefined);
const BLANK = new Set(["▢", "·", ""]);

let messages = [];
let stopping = null; // ends the answer that is being written

function add(kind, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.textContent = text;
  element("talk").append(turn);
  return turn;
}

let shown = [];
function show(cells) {
  const canvas = element("canvas");
  canvas.hidden = cells.length === 0;
  while (canvas.children.length > cells.length) canvas.lastChild.remove();
  cells.forEach((text, place) => {
    const cell = canvas.children[place] || canvas.appendChild(document.createElement("span"));
    const isNew = text !== shown[place];
    cell.textContent = text.replaceAll("\n", "⏎");
    cell.className = `cell${BLANK.has(text) ? " blank" : ""}${isNew && !BLANK.has(text) ? " new" : ""}`;
  });
  shown = cells;
}

function body(prompt) {
  const given = { model: server.model, stream: true, stream_options: { include_canvas: true, include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "seed"]) given[name] = number(name);
  return server.chat ? { ...given, messages } : { ...given, prompt };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(prompt) {
  const headers = { "Content-Type": "application/json" };
  if (element("key")) headers.Authorization = `Bearer ${element("key").value}`;
  const path = server.chat ? "v1/chat/completions" : "v1/completions";
  stopping = new AbortController();
  const signal = stopping.signal;
  const start = performance.now();
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body(prompt)), signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const answer = add("answer", "");
  let text = "";
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      text += (server.chat ? choice.delta.content : choice.text) || "";
      if (choice.canvas) show(choice.canvas);
    }
    answer.textContent = text;
    if (event.usage) {
      const seconds = (performance.now() - start) / 1000;
      const tokens = event.usage.completion_tokens;
      element("figures").textContent = `${tokens} tokens in ${seconds.toFixed(1)} s`;
    }
  }
  return text;
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = element("prompt").value;
  element("wrong").textContent = element("figures").textContent = "";
  element("send").disabled = true;
  element("stop").disabled = false;
  show([]);
  const before = messages;
  messages = [...messages, { role: "user", content: prompt }];
  const asked = add("asked", prompt);
  try {
    const text = await ask(prompt);
    show(shown); // nothing is new any more
    messages = [...messages, { role: "assistant", content: text }];
    element("prompt").value = "";
  } catch (error) {
    messages = before;
    if (error.name === "AbortError") element("figures").textContent = "stopped";
    else {
      asked.remove();
      element("wrong").textContent = error.message;
    }
  } finally {
    element("send").disabled = false;
    element("stop").disabled = true;
    element("prompt").focus();
  }
});

element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && server.chat) {
    event.preventDefault();
    if (!element("send").disabled) element("form").requestSubmit();
  }
});

element("stop").addEventListener("click", () => stopping.abort());
if (element("reset")) {
  element("reset").addEventListener("click", () => {
    messages = [];
    element("talk").replaceChildren();
    show([]);
  });
}
