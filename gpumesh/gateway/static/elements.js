"use strict";
// Elements, texts and figures. What hosts and clients say is only ever set as text, never as markup.

const SVG_TAGS = new Set(["svg", "polyline", "line", "rect", "text", "g", "circle"]);
const $ = (id) => document.getElementById(id);

/** Makes an element: its attributes, then its children (elements or texts). */
function el(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setClass(node, name) {
  if (node.className !== name) node.className = name;
}

/** Makes the children of a box one for each item, in their order, and keeps those that are there: a person may have the
 *  focus in one. ``make(key)`` returns { box, show(item) }. */
class KeyedList {
  constructor(parent, keyOf, make) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.make = make;
    this.rows = new Map();
  }

  show(items) {
    const keys = new Set(items.map(this.keyOf));
    for (const [key, row] of this.rows) {
      if (!keys.has(key)) {
        row.box.remove();
        this.rows.delete(key);
      }
    }
    let place = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      let row = this.rows.get(key);
      if (row === undefined) {
        row = this.make(key, item);
        this.rows.set(key, row);
      }
      if (row.box === place) place = place.nextElementSibling;
      else this.parent.insertBefore(row.box, place);
      row.show(item);
    }
  }
}

// -- figures ---------------------------------------------------------------------------------------------------------

const UNKNOWN = "–";
const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);

const number = (value, digits = 0, unit = "") => (isKnown(value) ? value.toFixed(digits) + unit : UNKNOWN);
const gib = (mib, digits = 1) => number(isKnown(mib) ? mib / 1024 : null, digits);
const compact = (value) => (isKnown(value) ? value.toFixed(value < 10 && value % 1 !== 0 ? 1 : 0) : UNKNOWN);
const count = (amount, noun) => amount + " " + noun + (amount === 1 ? "" : "s");

/** Seconds as a person says them: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min. */
function duration(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  if (seconds < 9.95) return seconds.toFixed(1) + " s";
  const whole = Math.round(seconds);
  if (whole < 60) return whole + " s";
  if (whole < 3600) return Math.floor(whole / 60) + " min" + (whole % 60 ? " " + (whole % 60) + " s" : "");
  if (whole < 172800) return Math.floor(whole / 3600) + " h" + (Math.floor((whole % 3600) / 60) ? " " + Math.floor((whole % 3600) / 60) + " min" : "");
  return Math.floor(whole / 86400) + " days";
}

const milliseconds = (ms) => (isKnown(ms) ? (ms < 1000 ? ms.toFixed(ms < 10 ? 1 : 0) + " ms" : (ms / 1000).toFixed(1) + " s") : UNKNOWN);
const twoDigits = (value) => String(value).padStart(2, "0");
const clockTime = (date, withSeconds = true) =>
  twoDigits(date.getHours()) + ":" + twoDigits(date.getMinutes()) + (withSeconds ? ":" + twoDigits(date.getSeconds()) : "");
const shortGpu = (name) => name.replace(/^NVIDIA (GeForce )?/, "");

// -- states ----------------------------------------------------------------------------------------------------------

const TONES = { healthy: "good", degraded: "warn", draining: "warn", unknown: "warn", down: "bad" };
const SIGNS = { healthy: "●", degraded: "▲", draining: "◐", unknown: "○", down: "✗" };
const SEVERITIES = { error: "bad", warning: "warn", info: "soft" };
// As in `gpumesh status`: a GPU that is busy or full is no fault, heat is a warning.
const HOT_C = 83;
const isHot = (gpu) => (isKnown(gpu.temperature_c) && gpu.temperature_c >= HOT_C) || /thermal|slowdown/.test(gpu.throttle || "");
// Unhealthy nodes come first.
const HEALTH_ORDER = { down: 0, degraded: 1, draining: 2, unknown: 3, healthy: 4 };

const healthText = (health) => (SIGNS[health] || "?") + " " + health;

/** A line of "dt, dd" pairs; those without a value are hidden. */
class Facts {
  constructor() {
    this.box = el("dl", { class: "facts" });
    this.pairs = new Map();
  }

  show(label, value) {
    if (!this.pairs.has(label)) {
      const pair = [el("dt", {}, label), el("dd")];
      this.box.append(...pair);
      this.pairs.set(label, pair);
    }
    const [term, detail] = this.pairs.get(label);
    term.hidden = detail.hidden = !value;
    setText(detail, value || "");
  }
}

/** A bar from 0 to 100 % with its name before it and its value after it. */
class Meter {
  constructor(name, { bare = false } = {}) {
    this.fill = el("div", { class: "fill" });
    this.value = el("span", { class: "value" });
    this.track = el("div", { class: "track", role: "meter", "aria-label": name, "aria-valuemin": "0", "aria-valuemax": "100" }, this.fill);
    this.box = el("div", { class: bare ? "meter bare" : "meter" }, bare ? null : el("span", { class: "soft" }, name), this.track, this.value);
  }

  show(percent, text) {
    const known = isKnown(percent);
    this.fill.style.width = (known ? Math.min(100, Math.max(0, percent)) : 0) + "%";
    if (known) this.track.setAttribute("aria-valuenow", String(Math.round(percent)));
    else this.track.removeAttribute("aria-valuenow");
    this.track.setAttribute("aria-valuetext", text);
    setText(this.value, text);
  }
}

const percentOf = (part, whole) => (isKnown(part) && whole ? (100 * part) / whole : null);

/** Says a text to screen readers. */
const say = (text) => setText($("said"), text);

/** Asks before something is changed. Resolves to whether the person agreed. */
function confirmed(title, text, verb) {
  const dialog = $("confirm");
  return new Promise((decide) => {
    const close = (answer) => {
      dialog.close();
      decide(answer);
    };
    dialog.replaceChildren(
      el("h2", { id: "confirm-title" }, title),
      el("p", {}, text),
      el("div", { class: "actions end" },
        el("button", { type: "button", click: () => close(false) }, "Leave it"),
        el("button", { type: "button", class: "danger", autofocus: true, click: () => close(true) }, verb)),
    );
    dialog.oncancel = () => decide(false);
    dialog.showModal();
  });
}

/** A button that copies a text. It says what it has done. */
function copyButton(what, textOf) {
  const button = el("button", { type: "button", class: "small", "aria-label": "Copy " + what }, "Copy");
  button.addEventListener("click", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(textOf());
    } catch (problem) {  // no permission, or no https: the text is selected, to be copied by hand
      done = false;
      const range = document.createRange();
      range.selectNodeContents(button.previousElementSibling || button);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
    }
    setText(button, done ? "Copied" : "Press Ctrl-C");
    say(done ? what + ": copied" : what + ": selected, press Ctrl-C");
    setTimeout(() => setText(button, "Copy"), 2000);
  });
  return button;
}
