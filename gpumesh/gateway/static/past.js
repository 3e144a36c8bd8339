"use strict";
// The past of the mesh: one range of it, asked of the gateway once, and then only what is new.

const RANGES = [[300, "5 min"], [900, "15 min"], [3600, "1 h"], [21600, "6 h"], [86400, "24 h"]];

const past = {
  range: Number(localStorage.getItem("gpumesh-range")) || 3600,
  step: 15,
  first: 0,  // the number of the first step, counted since 1970
  last: -1,
  series: {},  // by kind, then by GPU or node: one value for each step from ``first`` to ``last``
  listeners: new Set(),
  version: 0,
};
let pastTimer = 0;

/** Asks for what is new, and again when the next step may be there. */
async function loadPast() {
  clearTimeout(pastTimer);
  const version = past.version;
  if (gateway.isLive && !document.hidden) {
    const after = past.last > past.first ? "&after=" + (past.last - 1) : "";
    try {
      const part = await ask("/mesh/history?range=" + past.range + after);
      if (version === past.version) takePart(part, after !== "");
    } catch (problem) { /* the gateway is away, which the page says; what is drawn stays */ }
  }
  if (version === past.version) pastTimer = setTimeout(loadPast, Math.min(past.step, 15) * 1000);
}

/** Takes a part of the past. ``isMore``: it goes on from what is known. */
function takePart(part, isMore) {
  const steps = Math.round(past.range / part.step_s);
  if (!isMore || part.step_s !== past.step || part.first > past.last + 1) {
    past.step = part.step_s;
    past.first = part.first;
    past.series = {};
  }
  const first = Math.max(past.first, part.last - steps + 1);
  const series = {};
  const kinds = new Set([...Object.keys(past.series), ...Object.keys(part.series)]);
  for (const kind of kinds) {
    const before = past.series[kind] || {}, more = part.series[kind] || {};
    series[kind] = {};
    for (const key of new Set([...Object.keys(before), ...Object.keys(more)])) {
      const values = [];
      for (let step = first; step <= part.last; step += 1) {
        const known = step >= part.first ? (more[key] || [])[step - part.first] : (before[key] || [])[step - past.first];
        values.push(known === undefined ? null : known);
      }
      if (values.some((value) => value !== null)) series[kind][key] = values;
    }
  }
  past.first = first;
  past.last = part.last;
  past.series = series;
  for (const listener of past.listeners) listener();
}

function setRange(seconds) {
  past.range = seconds;
  past.version += 1;
  past.last = -1;
  past.first = 0;
  localStorage.setItem("gpumesh-range", String(seconds));
  for (const button of document.querySelectorAll(".ranges button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.range) === seconds));
  }
  say("range: " + RANGES.find(([range]) => range === seconds)[1]);
  loadPast();
}

/** Fills a group of buttons that choose the range. */
function fillRanges(box) {
  box.replaceChildren(...RANGES.map(([seconds, text]) => el("button", {
    type: "button", "data-range": seconds, "aria-pressed": String(seconds === past.range), click: () => setRange(seconds),
  }, text)));
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) loadPast();
});
