"use strict";
// Plays what `traces.compact` made. Texts of models and data go into the page as text alone, never as markup.
const examples = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const SECONDS_A_STEP = 0.7, MOST_SECONDS = 12, SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
let frames = [], given = new Set(), cells = [], at = 0, chosen = null, timer = null;

// What cannot be seen gets a sign; spaces stay, as cells show them.
const visible = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]/g,
  (sign) => SIGNS[sign] || `<${sign.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}>`);

const make = (name, text, parent) => {
  const element = document.createElement(name);
  element.textContent = text;
  if (parent) parent.append(element);
  return element;
};

function unfold(trace) {
  let frame = trace.tokens.map((text) => ({ text, confidence: 0, since: 0 }));
  const all = [frame];
  trace.steps.forEach((changes, step) => {
    frame = frame.slice();
    for (const [place, text, confidence] of changes) {
      const since = text === frame[place].text && frame[place].confidence ? frame[place].since : step + 1;
      frame[place] = { text, confidence, since };
    }
    all.push(frame);
  });
  return all;
}

function choose(number) {
  pause();
  const example = examples[number];
  frames = unfold(example.trace);
  given = new Set(example.trace.given);
  chosen = null;
  find("example").value = number;
  find("given-legend").hidden = !given.size;
  find("texts").replaceChildren();
  for (const [name, text] of example.texts) {
    make("dt", name, find("texts"));
    make("dd", visible(text), find("texts"));
  }
  // As wide as the widest text that comes there, up to a limit, so that the others stay where they are.
  cells = frames[0].map((_, place) => {
    const cell = make("span", "");
    const widest = Math.max(...frames.map((frame) => visible(frame[place].text).length));
    cell.style.minWidth = `calc(${Math.min(Math.max(widest, 1), 7)}ch + .7rem)`;
    cell.addEventListener("click", () => { chosen = chosen === place ? null : place; draw(); });
    return cell;
  });
  find("canvas").replaceChildren(...cells);
  find("step").max = frames.length - 1;
  const rows = frames.map((frame, step) => {
    const row = document.createElement("tr");
    make("th", step, row).scope = "row";
    make("td", visible(frame.map((token) => token.text).join("")), row);
    return row;
  });
  find("all").querySelector("tbody").replaceChildren(...rows);
  go(0);
}

function describe(place) {
  const token = frames[at][place], text = `token ${place + 1} “${visible(token.text)}”`;
  if (given.has(place)) return `${text}, given`;
  if (!token.confidence) return `${text}, not written yet`;
  return `${text}, probability ${token.confidence.toFixed(3)}, here since step ${token.since}`;
}

const isNew = (place) => at > 0 && frames[at][place].text !== frames[at - 1][place].text;

function draw() {
  const frame = frames[at];
  let changed = 0;
  cells.forEach((cell, place) => {
    const token = frame[place];
    const kind = given.has(place) ? "given" : token.confidence ? "written" : "blank";
    changed += isNew(place);
    cell.className = `cell ${kind}${isNew(place) ? " new" : ""}${place === chosen ? " chosen" : ""}`;
    cell.style.setProperty("--confidence", `${token.confidence * 100}%`);
    if (cell.textContent !== visible(token.text)) cell.textContent = visible(token.text);
    cell.title = describe(place) + (isNew(place) ? ", new" : "");
  });
  const last = frames.length - 1;
  find("step").value = at;
  find("where").textContent = `Step ${at} of ${last}` + (at ? `, ${changed} new` : "");
  find("step").setAttribute("aria-valuetext", find("where").textContent);
  find("first").disabled = find("back").disabled = at === 0;
  find("last").disabled = find("forth").disabled = at === last;
  find("about").textContent = chosen === null ? "" : describe(chosen);
}

function go(step) {
  at = Math.min(Math.max(step, 0), frames.length - 1);
  if (at === frames.length - 1) pause();
  draw();
}

function pause() {
  clearInterval(timer);
  timer = null;
  find("play").textContent = "▶ Play";
}

function play() {
  if (timer) return pause();
  if (at === frames.length - 1) go(0);
  if (frames.length < 2) return;
  find("play").textContent = "❚❚ Pause";
  const seconds = Math.min(SECONDS_A_STEP, MOST_SECONDS / (frames.length - 1));
  timer = setInterval(() => go(at + 1), seconds * 1000);
}

const stop = (step) => { pause(); go(step); };

find("first").addEventListener("click", () => stop(0));
find("back").addEventListener("click", () => stop(at - 1));
find("forth").addEventListener("click", () => stop(at + 1));
find("last").addEventListener("click", () => stop(frames.length - 1));
find("play").addEventListener("click", play);
find("step").addEventListener("input", (event) => stop(Number(event.target.value)));
find("example").addEventListener("change", (event) => choose(Number(event.target.value)));
document.addEventListener("keydown", (event) => {
  const number = Number(find("example").value);
  const keys = {
    ArrowLeft: () => stop(at - 1), ArrowRight: () => stop(at + 1), Home: () => stop(0), End: () => stop(frames.length - 1),
    ArrowUp: () => choose(Math.max(number - 1, 0)), ArrowDown: () => choose(Math.min(number + 1, examples.length - 1)),
    " ": play,
  };
  // Lists, sliders and buttons have their own use for these keys.
  const own = event.target.closest("select, summary") || (event.key === " " && event.target.closest("button"));
  if (!keys[event.key] || own || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  keys[event.key]();
});

examples.forEach((example, number) => { make("option", `${number + 1}. ${visible(example.name)}`, find("example")).value = number; });
choose(0);
