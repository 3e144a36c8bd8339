"use strict";
// One node: what it does now, its past, its GPUs and processes, its models, findings, and its part of the log.

const LOG_POLL_MS = 5000;

const nodeView = { name: null, parts: null, charts: [], logTimer: 0, logSeen: "" };
const nodeGpus = () => ((state.status && state.status.nodes.find((node) => node.name === nodeView.name)) || { gpus: [] }).gpus || [];
const nodeUuids = () => uuidsByNode.get(nodeView.name) || [];
const gpuLabel = (uuid) => {
  const gpu = nodeGpus().find((each) => each.uuid === uuid);
  return "GPU " + (gpu ? gpu.index : nodeUuids().indexOf(uuid));
};

// They stay, for whichever node is shown: each draws the series of this node.
const NODE_CHARTS = [
  { title: "GPU busy", kind: "gpus", unit: " %", keys: nodeUuids, label: gpuLabel, top: () => 100, fixed: true, digits: 0 },
  { title: "GPU memory in use", kind: "memory", unit: " GiB", keys: nodeUuids, label: gpuLabel, scale: (mib) => mib / 1024,
    top: () => Math.max(0, ...nodeGpus().map((gpu) => (gpu.memory_total_mib || 0) / 1024)) },
  { title: "Tokens/s", kind: "nodes", keys: () => [nodeView.name], digits: 0 },
  { title: "Requests in flight", kind: "requests", keys: () => [nodeView.name], top: () => 4 },
  { title: "GPU power", kind: "power", unit: " W", keys: nodeUuids, label: gpuLabel, digits: 0 },
  { title: "GPU temperature", kind: "temperature", unit: " °C", keys: nodeUuids, label: gpuLabel, digits: 0 },
];

function section(title, id, ...children) {
  return el("section", { "aria-labelledby": id }, el("h3", { id }, title), ...children);
}

function table(caption, heads, body) {
  return el("div", { class: "table-box" }, el("table", {}, el("caption", { class: "visually-hidden" }, caption),
    el("thead", {}, el("tr", {}, ...heads.map(([text, right]) => el("th", { scope: "col", class: right ? "right" : null }, text)))), body));
}

/** A body of texts in cells, one row for each item. ``right``: the columns with figures. */
class TextRows {
  constructor(keyOf, cellsOf, right = []) {
    this.body = el("tbody");
    this.list = new KeyedList(this.body, keyOf, () => {
      const box = el("tr");
      return { box, show(item) {
        const texts = cellsOf(item);
        while (box.children.length < texts.length) box.append(el("td", { class: right.includes(box.children.length) ? "right" : null }));
        texts.forEach((text, place) => {
          if (text instanceof Element) {
            if (box.children[place].firstChild !== text) box.children[place].replaceChildren(text);
          } else setText(box.children[place], text);
        });
      } };
    });
  }
}

function buildNodeView(name) {
  const parts = {
    title: el("h2", { tabindex: "-1", id: "node-title" }, name), badge: el("span", { class: "badge" }), reason: el("p", { class: "reason" }),
    hint: el("p", { class: "notice warn" }), actions: el("div", { class: "actions" }), gpuBox: el("div", { class: "gpu-grid" }),
    facts: new Facts(), learned: new Facts(), findings: el("ul", { class: "findings" }), ranges: el("div", { class: "choice ranges", role: "group", "aria-label": "Time range" }),
    plots: el("div", { class: "plots" }), log: el("ol", { class: "log", tabindex: "0", "aria-label": "Log of " + name }), buttons: {},
  };
  parts.gpus = new KeyedList(parts.gpuBox, (gpu) => gpu.uuid, () => {
    const row = gpuRow(), more = el("p", { class: "soft small-text" });
    row.box.classList.add("tile");
    row.box.append(more);
    return { box: row.box, show(gpu) {
      row.show(gpu);
      setText(more, [isKnown(gpu.clock_sm_mhz) ? gpu.clock_sm_mhz + " MHz" : "", isKnown(gpu.fan_pct) ? "fan " + gpu.fan_pct + " %" : "",
        gpu.pstate || "", gpu.throttle && !["idle", "none"].includes(gpu.throttle) ? "throttled: " + gpu.throttle : "", "GPU " + gpu.index].filter(Boolean).join(" · "));
    } };
  });
  parts.processes = new TextRows((process) => process.key, (process) => [String(process.pid), process.name, gib(process.used_memory_mib, 1), String(process.gpu)], [0, 2, 3]);
  parts.models = new TextRows((model) => model.name, (model) => [
    el("button", { type: "button", class: "plain", click: () => openModel(model.name) }, model.name),
    gib(model.size_mib), [model.parameter_size, model.quantization].filter(Boolean).join(" ") || UNKNOWN, model.loadedText], [1]);
  for (const action of ["drain", "resume", "reconnect"]) {
    const button = parts.buttons[action] = el("button", { type: "button", click: () => changeNode(name, action), "aria-label": action + " " + name }, action);
    parts.actions.append(button);
  }
  fillRanges(parts.ranges);
  if (!nodeView.charts.length) nodeView.charts = NODE_CHARTS.map((options) => new Chart(options));
  parts.plots.append(...nodeView.charts.map((chart) => chart.box));
  parts.processBox = section("Processes on its GPUs", "node-processes", table("Processes", [["PID", true], ["Name"], ["GiB", true], ["GPU", true]], parts.processes.body));
  parts.modelBox = section("Models on disk", "node-models", table("Models", [["Model"], ["GiB", true], ["Kind"], ["In memory"]], parts.models.body));
  parts.findingBox = section("Findings", "node-findings", parts.findings);
  parts.logBox = section("Log", "node-log", parts.log);
  parts.learnedBox = section("What the balancer has learned", "node-learned", parts.learned.box);
  $("view-node").replaceChildren(
    el("p", {}, el("a", { href: "#/", class: "back" }, "← All nodes")),
    el("div", { class: "title-row" }, parts.title, parts.badge, parts.actions), parts.reason, parts.hint, parts.findingBox, parts.gpuBox,
    el("div", { class: "title-row" }, el("h3", { id: "node-past" }, "The past"), parts.ranges), parts.plots,
    el("div", { class: "columns" },
      el("div", {}, section("Now", "node-now", parts.facts.box), parts.learnedBox),
      el("div", {}, parts.modelBox, parts.processBox)),
    parts.logBox,
  );
  return parts;
}

function openNodeView(name) {
  nodeView.name = name;
  nodeView.logSeen = "";
  nodeView.parts = buildNodeView(name);
  showNodeView();
  nodeView.charts.forEach((chart) => chart.draw());
  loadNodeLog();
}

function closeNodeView() {
  nodeView.name = null;
  clearTimeout(nodeView.logTimer);
}

const learnedText = (each) => [
  isKnown(each.tokens_per_s) ? number(each.tokens_per_s) + " tokens/s alone" : "",
  isKnown(each.prefill_tokens_per_s) ? "reads " + number(each.prefill_tokens_per_s) + "/s" : "",
  isKnown(each.load_s) ? "loads in " + duration(each.load_s) : "",
  isKnown(each.slots) ? count(each.slots, "slot") : "",
].filter(Boolean).join(", ");
const decisionText = (each) => number(each.forecast_s, 2, " s") + " (took " + number(each.actual_s, 2, " s") + ") = " + each.why;
const loadingText = (loading) => (loading ? loading.loads + " in the last " + number(loading.window_s, 0, " s") + ", "
  + number((100 * loading.load_s) / loading.window_s) + " % of the time: "
  + loading.models.map((model) => model.name + (model.loads === 1 ? " once" : " " + model.loads + " times")).join(", ") : "");

function loadedText(loaded, at) {
  if (!loaded) return "";
  const left = loaded.expires_at ? (Date.parse(loaded.expires_at) - Date.parse(at)) / 1000 : null;
  const split = isKnown(loaded.size_mib) && isKnown(loaded.size_vram_mib) && loaded.size_vram_mib < loaded.size_mib ? ", partly on the CPU" : "";
  return gib(loaded.size_vram_mib) + " GiB" + split + (left === null ? "" : left > 31536000 ? ", stays" : left > 0 ? ", " + duration(left) + " more" : "");
}

function showNodeView() {
  const { name, parts } = nodeView;
  if (name === null || !state.status) return;
  const node = state.status.nodes.find((each) => each.name === name);
  if (!node) {
    $("view-node").replaceChildren(el("p", {}, el("a", { href: "#/" }, "← All nodes")), el("h2", {}, name), el("p", { class: "empty" }, "This mesh has no such node (any more)."));
    return;
  }
  if (!parts.title.isConnected) {  // it was gone for a while, and is back
    openNodeView(name);
    return;
  }
  setClass(parts.badge, "badge " + (TONES[node.health] || "warn"));
  setText(parts.badge, healthText(node.health));
  setText(parts.reason, node.reason || "");
  parts.reason.hidden = !node.reason;
  setText(parts.hint, node.tunnel.hint ? "→ " + node.tunnel.hint : "");
  parts.hint.hidden = !node.tunnel.hint;
  parts.actions.hidden = !gateway.page.writable;
  parts.buttons.drain.hidden = node.health === "draining";
  parts.buttons.resume.hidden = node.health !== "draining";
  parts.gpus.show(node.gpus || []);
  showNodeFacts(node, parts);
  const processes = (node.gpus || []).flatMap((gpu) => gpu.processes.map((process) => ({ ...process, gpu: gpu.index, key: gpu.uuid + "/" + process.pid })));
  parts.processes.list.show(processes);
  parts.processBox.hidden = !processes.length;
  const details = new Map(node.backend.catalog.map((info) => [info.name, info])), loaded = new Map(node.backend.loaded.map((model) => [model.name, model]));
  const names = [...new Set([...node.backend.models, ...loaded.keys()])].sort((a, b) => Number(loaded.has(b)) - Number(loaded.has(a)) || a.localeCompare(b));
  parts.models.list.show(names.map((model) => ({ name: model, size_mib: null, ...details.get(model), loadedText: loadedText(loaded.get(model), state.status.at) })));
  parts.modelBox.hidden = !names.length;
  const findings = state.status.findings.filter((finding) => finding.node === name || finding.nodes.includes(name)).sort(bySeverity);
  const now = JSON.stringify(findings);
  if (parts.findingsShown !== now) {
    parts.findingsShown = now;
    parts.findings.replaceChildren(...findings.map(findingItem));
  }
  parts.findingBox.hidden = !findings.length;
  parts.logBox.hidden = !gateway.page.log;
}

function showNodeFacts(node, parts) {
  const { tunnel, backend, load, host } = node, facts = parts.facts;
  facts.show("tunnel", tunnelText(tunnel));
  facts.show("since", tunnel.since ? new Date(tunnel.since).toLocaleString() : "");
  facts.show("last error", tunnel.state === "up" ? "" : tunnel.last_error);
  facts.show("server", backend.kind + (backend.version ? " " + backend.version : "") + (backend.state === "up" ? "" : ", " + backend.state));
  facts.show("its error", backend.state === "up" ? "" : backend.last_error);
  facts.show("answers in", isKnown(backend.latency_ms) ? milliseconds(backend.latency_ms) : "");
  facts.show("requests", requestsText(load) + (isKnown(load.limit) ? ", " + load.limit + " at once" : "") + ", " + load.served + " served" + (load.failed ? ", " + load.failed + " failed" : "") + (load.cancelled ? ", " + load.cancelled + " cancelled" : ""));
  facts.show("tokens/s", isKnown(backend.tokens_per_s) ? number(backend.tokens_per_s, 1) : "");
  facts.show("KV cache", isKnown(backend.kv_cache_pct) ? backend.kv_cache_pct + " %" : "");
  facts.show("host", [host.hostname, host.driver ? "driver " + host.driver : ""].filter(Boolean).join(", "));
  facts.show("free for models", isKnown(host.store_free_mib) ? gib(host.store_free_mib, 0) + " GiB" : "");
  facts.show("labels", (node.labels || []).map(([key, value]) => key + "=" + value).join(", "));
  facts.show("loads", loadingText(node.loading));
  facts.show("broken models", (node.broken_models || []).map((model) => model.name + ": " + (model.error || model.why)).join("; "));
  const learned = node.learned || [], decisions = node.decisions || [];
  for (const each of learned) parts.learned.show(each.model, learnedText(each));
  parts.learned.show("last forecast", decisions.slice(0, 1).map(decisionText).join(""));
  parts.learnedBox.hidden = !learned.length && !decisions.length;
}

async function loadNodeLog() {
  clearTimeout(nodeView.logTimer);
  const name = nodeView.name;
  if (name === null) return;
  if (gateway.page.log && gateway.isLive && !document.hidden) {
    try {
      const { lines } = await ask("/mesh/log?node=" + encodeURIComponent(name));
      if (name === nodeView.name) showLog(lines);
    } catch (problem) { /* the page says when the gateway is away */ }
  }
  if (name === nodeView.name) nodeView.logTimer = setTimeout(loadNodeLog, LOG_POLL_MS);
}

function showLog(lines) {
  const now = JSON.stringify(lines);
  if (now === nodeView.logSeen) return;
  nodeView.logSeen = now;
  const tones = { warning: "warn", error: "bad", critical: "bad" };
  const today = new Date().toDateString();
  nodeView.parts.log.replaceChildren(...lines.map((line) => {
    const at = new Date(line.at);
    return el("li", {}, el("time", { datetime: line.at }, (at.toDateString() === today ? "" : at.toLocaleDateString() + " ") + clockTime(at)),
      el("span", { class: "level " + (tones[line.level] || "soft") }, line.level), el("span", { class: "message" }, line.message));
  }), ...(lines.length ? [] : [el("li", { class: "empty" }, "Nothing yet.")]));
}
