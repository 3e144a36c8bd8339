"use strict";
// Plots of the past: time axis with round steps, hover and arrow keys with values. They start where the data starts.

const CHART_HEIGHT = 150, LEFT = 44, RIGHT = 10, TOP = 8, BOTTOM = 20;
const TIME_STEPS = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 14400, 21600];
const DISTINCT = 8;  // series that have a colour and a place in the legend; the others are grey
const SHOWN_VALUES = 10;  // in the box beside the pointer
const LEAST_SPAN_S = 60;

/** A round step for an axis to ``top`` with at most ``count`` steps: 1, 2 or 5 times a power of ten. */
function roundStep(top, count) {
  const power = 10 ** Math.floor(Math.log10(top / count));
  const times = [1, 2, 5, 10].find((factor) => factor * power * count >= top * 0.9999);
  return times * power;
}

/** The times of the axis, in seconds since 1970: round in local time. */
function timeTicks(from, to, most) {
  const step = TIME_STEPS.find((seconds) => (to - from) / seconds <= most) || TIME_STEPS.at(-1);
  const offset = new Date(from * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let at = Math.ceil((from - offset) / step) * step + offset; at <= to; at += step) ticks.push(at);
  return { ticks, withSeconds: step < 60 };
}

const axisText = (value) => (value >= 10000 ? value / 1000 + "k" : String(Math.round(value * 1000) / 1000));

class Chart {
  /** ``kind``: of the series; ``keys()``: the series to draw, null for all; ``label(key)``; ``scale``: from the stored
   *  value to the shown one; ``top``: the least end of the axis; ``fixed``: whether the axis always ends there.
   *  ``combine``: series with one label are one line, their "mean" or their "sum". */
  constructor({ title, kind, unit = "", keys = () => null, label = (key) => key, scale = (value) => value, top = () => 0, fixed = false, digits = null, combine = null }) {
    Object.assign(this, { title, kind, unit, keys, label, scale, top, fixed, digits, combine });
    this.now = el("span", { class: "soft" });
    this.svg = el("svg", { role: "img", tabindex: "0", "aria-label": title });
    this.legend = el("div", { class: "legend" });
    this.tip = el("div", { class: "tip", hidden: true });
    this.empty = el("p", { class: "empty" }, "No data yet.");
    this.plot = el("div", { class: "plot" }, this.svg, this.tip, this.empty);
    this.box = el("figure", { class: "chart" }, el("figcaption", {}, el("strong", {}, title), this.now), this.plot, this.legend);
    this.width = 0;
    this.at = null;  // the step that the pointer or the arrow keys have chosen
    new ResizeObserver(() => {
      const width = Math.floor(this.plot.clientWidth);
      if (width && width !== this.width) {
        this.width = width;
        this.draw();
      }
    }).observe(this.plot);
    this.svg.addEventListener("pointermove", (event) => this.choose(this.stepAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.choose(null));
    this.svg.addEventListener("blur", () => this.choose(null));
    this.svg.addEventListener("keydown", (event) => this.handleKey(event));
  }

  text(value) {
    return number(value, this.digits === null ? (value < 10 && value % 1 ? 1 : 0) : this.digits, this.unit);
  }

  /** The series, with the largest last value first, and where they begin. */
  read() {
    const wanted = this.keys(), stored = past.series[this.kind] || {};
    const byLabel = new Map();
    for (const key of Object.keys(stored)) {
      if (wanted !== null && !wanted.includes(key)) continue;
      const label = this.label(key), values = stored[key].map((value) => (value === null ? null : this.scale(value)));
      if (!byLabel.has(label)) byLabel.set(label, []);
      byLabel.get(label).push(values);
    }
    const series = [...byLabel].map(([label, parts]) => ({ label, values: parts.length === 1 ? parts[0] : this.combined(parts) }))
      .filter((each) => each.values.some((value) => value !== null));
    // A series keeps its colour while values change: they are in the order of their names, unless there are too many.
    series.sort((a, b) => (a.label < b.label ? -1 : 1));
    if (series.length > DISTINCT) {
      const mean = (each) => each.values.reduce((sum, value) => sum + (value || 0), 0);
      const largest = new Set([...series].sort((a, b) => mean(b) - mean(a)).slice(0, DISTINCT));
      series.sort((a, b) => Number(largest.has(b)) - Number(largest.has(a)));
    }
    return series;
  }

  combined(parts) {
    return parts[0].map((_, index) => {
      const values = parts.map((part) => part[index]).filter((value) => value !== null);
      const sum = values.reduce((total, value) => total + value, 0);
      return values.length ? (this.combine === "sum" ? sum : sum / values.length) : null;
    });
  }

  draw() {
    const series = this.series = this.read();
    this.empty.hidden = series.length > 0;
    this.svg.classList.toggle("blank", !series.length);
    if (!this.width) return;
    const { svg, width } = this;
    svg.setAttribute("viewBox", `0 0 ${width} ${CHART_HEIGHT}`);
    svg.setAttribute("height", CHART_HEIGHT);
    const begins = series.map((each) => each.values.findIndex((value) => value !== null));
    this.firstStep = past.first + Math.min(Math.max(past.last - past.first, 0), ...begins);
    this.to = (past.last + 1) * past.step;
    this.from = Math.min(this.firstStep * past.step, this.to - LEAST_SPAN_S);
    const peak = Math.max(this.top(), ...series.map((each) => Math.max(...each.values.map((value) => value || 0))), 0);
    const step = roundStep(peak || 1, 4);
    this.peak = this.fixed ? this.top() : Math.max(Math.ceil((peak || 1) / step - 1e-9) * step, step);
    const parts = this.axes(this.fixed ? this.top() / 4 : step);
    [...series.entries()].reverse().forEach(([place, each]) => parts.push(...this.lines(each, place)));
    this.cursor = el("line", { class: "cursor", y1: TOP, y2: CHART_HEIGHT - BOTTOM, visibility: "hidden" });
    svg.replaceChildren(...parts, this.cursor);
    this.showLegend(series);
    this.showChosen();
  }

  x(at) {
    return LEFT + ((this.width - LEFT - RIGHT) * (at - this.from)) / (this.to - this.from);
  }

  y(value) {
    return CHART_HEIGHT - BOTTOM - ((CHART_HEIGHT - TOP - BOTTOM) * Math.min(value, this.peak)) / this.peak;
  }

  axes(step) {
    const parts = [];
    for (let value = 0; value <= this.peak + step / 100; value += step) {
      const y = this.y(value).toFixed(1);
      parts.push(el("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }),
        el("text", { class: "axis", x: LEFT - 6, y: Number(y) + 4, "text-anchor": "end" }, axisText(value)));
    }
    const { ticks, withSeconds } = timeTicks(this.from, this.to, Math.max(2, Math.floor((this.width - LEFT) / 76)));
    for (const at of ticks) {
      const x = this.x(at).toFixed(1);
      parts.push(el("line", { class: "tick", x1: x, x2: x, y1: CHART_HEIGHT - BOTTOM, y2: CHART_HEIGHT - BOTTOM + 4 }));
      if (x > LEFT + 14 && x < this.width - 18) {
        parts.push(el("text", { class: "axis", x, y: CHART_HEIGHT - 4, "text-anchor": "middle" }, clockTime(new Date(at * 1000), withSeconds)));
      }
    }
    return parts;
  }

  /** A line for each run of known values: what is not known is a gap. */
  lines(each, place) {
    const made = [], look = place < DISTINCT ? "line s" + place : "line other";
    let points = [];
    const end = () => {
      if (points.length === 1) points.push((Number(points[0].split(",")[0]) + 1).toFixed(1) + "," + points[0].split(",")[1]);
      if (points.length) made.push(el("polyline", { class: look, points: points.join(" ") }));
      points = [];
    };
    each.values.forEach((value, index) => {
      if (value === null) end();
      else points.push(this.x((past.first + index + 0.5) * past.step).toFixed(1) + "," + this.y(value).toFixed(1));
    });
    end();
    return made;
  }

  showLegend(series) {
    const shown = series.slice(0, DISTINCT);
    const now = (each) => each.values.at(-1) ?? each.values.at(-2);
    const items = shown.map((each, place) => el("span", { class: "key" }, el("i", { class: "dot s" + place }), each.label + " ", el("b", {}, this.text(now(each)))));
    if (series.length > DISTINCT) items.push(el("span", { class: "key soft" }, "and " + (series.length - DISTINCT) + " more, in grey"));
    this.legend.replaceChildren(...(series.length > 1 || this.keys() === null ? items : []));
    setText(this.now, series.length === 1 ? this.text(now(series[0])) : "");
    const told = shown.map((each) => each.label + " " + this.text(now(each))).join(", ");
    this.svg.setAttribute("aria-label", this.title + ", now: " + (told || "no data yet") + ". Arrow keys read the past.");
  }

  stepAt(x) {
    const at = this.from + ((x - LEFT) * (this.to - this.from)) / (this.width - LEFT - RIGHT);
    return Math.min(Math.max(Math.floor(at / past.step), this.firstStep), past.last);
  }

  choose(step) {
    this.at = step;
    this.showChosen();
  }

  handleKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
    if (event.key in moves) {
      const from = this.at === null ? past.last + (moves[event.key] < 0 ? 1 : 0) : this.at;
      this.choose(Math.min(Math.max(from + moves[event.key], this.firstStep), past.last));
      say(this.tip.textContent);
    } else if (event.key === "Home") this.choose(this.firstStep);
    else if (event.key === "End") this.choose(past.last);
    else if (event.key === "Escape" && this.at !== null) this.choose(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** The line and the box of values at the chosen step. */
  showChosen() {
    const step = this.at, index = step === null ? -1 : step - past.first;
    const values = (this.series || []).map((each, place) => ({ place, label: each.label, value: each.values[index] }))
      .filter(({ value }) => value !== null && value !== undefined);
    if (!this.cursor) return;
    if (step === null || index < 0 || !values.length) {
      this.cursor.setAttribute("visibility", "hidden");
      this.tip.hidden = true;
      return;
    }
    const x = this.x((step + 0.5) * past.step);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
    const isGrey = ({ place }) => Number(place >= DISTINCT);  // what has a colour comes first: it can be found in the plot
    values.sort((a, b) => isGrey(a) - isGrey(b) || b.value - a.value);
    const more = values.length - SHOWN_VALUES;
    const time = clockTime(new Date(step * past.step * 1000), past.step < 60);
    this.tip.replaceChildren(el("div", { class: "soft" }, time + " "), ...values.slice(0, SHOWN_VALUES).map(({ place, label, value }) =>
      el("div", { class: "row" }, el("i", { class: "dot " + (place < DISTINCT ? "s" + place : "other") }), el("span", {}, label + " "), el("b", {}, this.text(value) + " "))),
    ...(more > 0 ? [el("div", { class: "soft" }, "and " + more + " more")] : []));
    this.tip.hidden = false;
    const width = this.tip.offsetWidth;
    this.tip.style.left = (x + 12 + width > this.width ? Math.max(x - 12 - width, 0) : x + 12) + "px";
  }
}

// -- the plots of the overview ---------------------------------------------------------------------------------------

const seriesLabels = new Map([["in_flight", "in flight"], ["queued", "waiting"]]);
const uuidsByNode = new Map();  // also of a node that is away, whose GPUs the status does not name
let largestGib = 0;  // of one node

/** The figures of GPUs are drawn by node. A GPU that two nodes share belongs to the first of them. */
function learnLabels(status) {
  const seen = new Set();
  largestGib = 0;
  for (const node of status.nodes) {
    const own = (node.gpus || []).filter((gpu) => !seen.has(gpu.uuid));
    for (const gpu of own) seriesLabels.set(gpu.uuid, node.name);
    if (node.gpus && node.gpus.length) uuidsByNode.set(node.name, node.gpus.map((gpu) => gpu.uuid));
    for (const gpu of own) seen.add(gpu.uuid);
    largestGib = Math.max(largestGib, own.reduce((sum, gpu) => sum + (gpu.memory_total_mib || 0) / 1024, 0));
  }
}

const labelOf = (key) => seriesLabels.get(key) || key;
const overviewCharts = [
  new Chart({ title: "GPU busy", kind: "gpus", unit: " %", label: labelOf, combine: "mean", top: () => 100, fixed: true, digits: 0 }),
  new Chart({ title: "GPU memory in use", kind: "memory", unit: " GiB", label: labelOf, combine: "sum", scale: (mib) => mib / 1024, top: () => largestGib }),
  new Chart({ title: "Tokens/s", kind: "nodes", digits: 0 }),
  new Chart({ title: "Requests", kind: "mesh", keys: () => ["in_flight", "queued"], label: labelOf, top: () => 4 }),
  new Chart({ title: "TTFT, median of 5 min", kind: "mesh", unit: " ms", keys: () => ["ttft_p50_ms"], label: () => "p50", digits: 0 }),
  new Chart({ title: "GPU power", kind: "power", unit: " W", label: labelOf, combine: "sum", digits: 0 }),
];
