"use strict";
// All nodes: as cards, or as a table that can be sorted and filtered. Unhealthy nodes come first.

const MANY_NODES = 8;  // from so many on the table is shown at first
const memoryOf = (node) => (node.gpus || []).reduce((sum, gpu) => [sum[0] + (gpu.memory_used_mib || 0), sum[1] + (gpu.memory_total_mib || 0)], [0, 0]);
const meanOf = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const known = (node, name) => (node.gpus || []).map((gpu) => gpu[name]).filter(isKnown);
const sumOf = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) : null);
const gpuNames = (node) => {
  const names = (node.gpus || []).map((gpu) => shortGpu(gpu.name));
  return names.length > 1 && new Set(names).size === 1 ? names.length + " × " + names[0] : names.join(", ");
};
const loadedNames = (node) => node.backend.loaded.map((model) => model.name).join(", ");
const requestsText = (load) => load.in_flight + " in flight" + (load.queued ? ", " + load.queued + " waiting" : "");

// Each column: its title, what it is sorted by (texts upwards, numbers downwards at first), and its text.
const COLUMNS = [
  { id: "name", title: "Node", sort: (node) => node.name },
  { id: "state", title: "State", sort: (node) => HEALTH_ORDER[node.health] ?? 5, ascending: true },
  { id: "gpu", title: "GPU", sort: (node) => gpuNames(node), text: (node) => gpuNames(node) || UNKNOWN },
  { id: "memory", title: "Memory", sort: (node) => percentOf(...memoryOf(node)) },
  { id: "busy", title: "Busy", sort: (node) => meanOf(known(node, "utilization_pct")) },
  { id: "temperature", title: "°C", right: true, sort: (node) => Math.max(...known(node, "temperature_c")), text: (node) => (known(node, "temperature_c").length ? String(Math.max(...known(node, "temperature_c"))) : UNKNOWN) },
  { id: "power", title: "W", right: true, sort: (node) => sumOf(known(node, "power_w")), text: (node) => number(sumOf(known(node, "power_w"))) },
  { id: "tokens", title: "Tok/s", right: true, sort: (node) => node.backend.tokens_per_s, text: (node) => number(node.backend.tokens_per_s) },
  { id: "requests", title: "Requests", right: true, sort: (node) => node.load.in_flight + node.load.queued, text: (node) => node.load.in_flight + (node.load.queued ? " +" + node.load.queued : "") },
  { id: "loaded", title: "In memory", sort: (node) => loadedNames(node), text: (node) => loadedNames(node) || UNKNOWN },
  { id: "rtt", title: "RTT", right: true, sort: (node) => node.tunnel.rtt_ms, text: (node) => milliseconds(node.tunnel.rtt_ms) },
];

const nodesView = {
  nodes: [],
  form: localStorage.getItem("gpumesh-nodes"),  // "cards", "table" or null: by the number of nodes
  sort: COLUMNS.find((column) => column.id === localStorage.getItem("gpumesh-sort")) ? localStorage.getItem("gpumesh-sort") : "state",
  reversed: false,
};

const nodeLink = (name) => "#/nodes/" + encodeURIComponent(name);

// -- cards -----------------------------------------------------------------------------------------------------------

function gpuRow() {
  const name = el("span", { class: "gpu-name" }), heat = el("span", { class: "value" });
  const memory = new Meter("memory"), busy = new Meter("busy");
  const box = el("div", { class: "gpu" }, el("div", { class: "gpu-head" }, name, heat), memory.box, busy.box);
  return { box, show(gpu) {
    setText(name, shortGpu(gpu.name));
    heat.classList.toggle("warn", isHot(gpu));
    setText(heat, number(gpu.temperature_c, 0, " °C") + " · " + number(gpu.power_w) + " / " + number(gpu.power_limit_w, 0, " W"));
    memory.show(percentOf(gpu.memory_used_mib, gpu.memory_total_mib), gib(gpu.memory_used_mib) + " / " + gib(gpu.memory_total_mib) + " GiB");
    busy.show(gpu.utilization_pct, number(gpu.utilization_pct, 0, " %"));
  } };
}

let cardNumber = 0;

function makeCard(name) {
  const title = el("h3", { id: "node-" + (cardNumber += 1) }, el("a", { href: nodeLink(name) }, name));
  const badge = el("span", { class: "badge" }), reason = el("p", { class: "reason" }), gpuBox = el("div");
  const facts = new Facts(), gpus = new KeyedList(gpuBox, (gpu) => gpu.uuid, gpuRow);
  const article = el("article", { "aria-labelledby": title.id }, el("div", { class: "head" }, title, badge), reason, gpuBox, facts.box);
  return { box: el("li", {}, article), show(node) {
    const tone = TONES[node.health] || "warn";
    setClass(article, "is-" + tone);
    setClass(badge, "badge " + tone);
    setText(badge, healthText(node.health));
    setText(reason, node.reason || "");
    reason.hidden = !node.reason;
    gpus.show(node.gpus || []);
    facts.show("what to do", node.tunnel.hint);
    const names = node.backend.loaded.map((model) => model.name).join(", ");
    facts.show("in memory", names || (node.backend.models.length ? "nothing of " + count(node.backend.models.length, "model") : ""));
    facts.show("requests", node.health === "down" ? "" : requestsText(node.load) + (node.load.failed ? ", " + node.load.failed + " failed" : ""));
    facts.show("tokens/s", isKnown(node.backend.tokens_per_s) ? number(node.backend.tokens_per_s) : "");
    facts.show("tunnel", tunnelText(node.tunnel));
  } };
}

function tunnelText(tunnel) {
  return tunnel.transport + " " + tunnel.state
    + (tunnel.retry_in_s === null ? "" : ", again in " + Math.ceil(tunnel.retry_in_s) + " s")
    + (tunnel.rtt_ms === null ? "" : ", " + milliseconds(tunnel.rtt_ms))
    + (tunnel.reconnects ? ", " + count(tunnel.reconnects, "reconnect") : "");
}

// -- the table -------------------------------------------------------------------------------------------------------

const tableHeads = new Map();
const tableBody = el("tbody");
$("table-box").append(el("table", { class: "nodes" },
  el("caption", { class: "visually-hidden" }, "Nodes"),
  el("thead", {}, el("tr", {}, ...COLUMNS.map((column) => {
    const head = el("th", { scope: "col", class: "c-" + column.id + (column.right ? " right" : "") },
      el("button", { type: "button", click: () => sortNodes(column.id) }, column.title));
    tableHeads.set(column.id, head);
    return head;
  }))), tableBody));

function makeRow(name) {
  const badge = el("span", { class: "badge" }), reason = el("span", { class: "reason" });
  const memory = new Meter("memory of " + name, { bare: true }), busy = new Meter("busy " + name, { bare: true });
  const own = { name: el("a", { href: nodeLink(name) }, name), state: el("div", {}, badge, reason), memory: memory.box, busy: busy.box };
  const cells = new Map(COLUMNS.map((column) => [column.id, column.id === "name"
    ? el("th", { scope: "row", class: "c-name" }, own.name)
    : el("td", { class: "c-" + column.id + (column.right ? " right" : "") }, ...(own[column.id] ? [own[column.id]] : []))]));
  const box = el("tr", {}, ...cells.values());
  return { box, show(node) {
    setClass(box, "is-" + (TONES[node.health] || "warn"));
    setClass(badge, "badge " + (TONES[node.health] || "warn"));
    setText(badge, healthText(node.health));
    setText(reason, node.reason || "");
    const [used, total] = memoryOf(node), mean = meanOf(known(node, "utilization_pct"));
    memory.show(percentOf(used, total), total ? gib(used) + " / " + gib(total, 0) : UNKNOWN);
    busy.show(mean, number(mean, 0, " %"));
    for (const column of COLUMNS) if (column.text) setText(cells.get(column.id), column.text(node));
    cells.get("temperature").classList.toggle("warn", (node.gpus || []).some(isHot));
    cells.get("loaded").title = loadedNames(node);
  } };
}

const cardList = new KeyedList($("cards"), (node) => node.name, makeCard);
const rowList = new KeyedList(tableBody, (node) => node.name, makeRow);

// -- sorting and filtering -------------------------------------------------------------------------------------------

function compareNodes(a, b) {
  const column = COLUMNS.find(({ id }) => id === nodesView.sort);
  const [x, y] = [column.sort(a), column.sort(b)];
  const unknown = (value) => value === null || value === undefined || value === -Infinity || value === "";
  let order;
  if (unknown(x) || unknown(y)) order = Number(unknown(x)) - Number(unknown(y));  // what is not known comes last
  else {
    order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : column.ascending ? x - y : y - x;
    if (nodesView.reversed) order = -order;
  }
  return order || a.name.localeCompare(b.name, undefined, { numeric: true });
}

function matches(node, words) {
  const text = [node.name, node.health, gpuNames(node), node.backend.kind, ...node.backend.models, ...(node.labels || []).flat()].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function sortNodes(id) {
  nodesView.reversed = nodesView.sort === id && !nodesView.reversed;
  nodesView.sort = id;
  localStorage.setItem("gpumesh-sort", id);
  $("sort").value = id;
  say("sorted by " + COLUMNS.find((column) => column.id === id).title + (nodesView.reversed ? ", reversed" : ""));
  showNodes(nodesView.nodes);
}

function showNodesAs(form) {
  nodesView.form = form;
  localStorage.setItem("gpumesh-nodes", form);
  showNodes(nodesView.nodes);
}

function showNodes(nodes) {
  nodesView.nodes = nodes;
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = nodes.filter((node) => matches(node, words)).sort(compareNodes);
  const asTable = nodesView.form === null ? nodes.length >= MANY_NODES : nodesView.form === "table";
  (asTable ? rowList : cardList).show(shown);
  (asTable ? cardList : rowList).show([]);
  $("cards").hidden = asTable || !shown.length;
  $("table-box").hidden = !asTable || !shown.length;
  $("no-nodes").hidden = shown.length > 0 || !nodes.length;
  $("filter").hidden = nodes.length < 3;
  $("sort-label").hidden = asTable || nodes.length < 3;
  $("as-cards").setAttribute("aria-pressed", String(!asTable));
  $("as-table").setAttribute("aria-pressed", String(asTable));
  for (const [id, head] of tableHeads) {
    const ascending = COLUMNS.find((column) => column.id === id).ascending || ["name", "gpu", "loaded"].includes(id);
    if (id === nodesView.sort) head.setAttribute("aria-sort", ascending !== nodesView.reversed ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  const title = "Nodes" + (words.length ? " (" + shown.length + " of " + nodes.length + ")" : "");
  setText($("nodes-title"), title);
}

$("sort").append(...COLUMNS.map((column) => el("option", { value: column.id }, column.title)));
$("sort").value = nodesView.sort;
$("sort").addEventListener("change", () => {
  nodesView.sort = null;
  sortNodes($("sort").value);
});
$("filter").addEventListener("input", () => showNodes(nodesView.nodes));
$("as-cards").addEventListener("click", () => showNodesAs("cards"));
$("as-table").addEventListener("click", () => showNodesAs("table"));

/** Says a node's change of health to screen readers, and which nodes are new or gone after a reload. */
const healthBefore = new Map();
function sayHealth(nodes) {
  const names = new Set(nodes.map((node) => node.name)), isFirst = !healthBefore.size;
  for (const name of [...healthBefore.keys()]) {
    if (names.has(name)) continue;
    healthBefore.delete(name);
    say(name + " is no node of this mesh any more");
  }
  for (const node of nodes) {
    const before = healthBefore.get(node.name);
    if (before !== undefined && before !== node.health) say(node.name + " is " + node.health + (node.reason ? ": " + node.reason : ""));
    if (before === undefined && !isFirst) say(node.name + " is a new node of this mesh");
    healthBefore.set(node.name, node.health);
  }
}
