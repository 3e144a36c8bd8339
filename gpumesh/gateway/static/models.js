"use strict";
// The fleet's models: which node has which, where it is in memory; pull, load, unload, copy to other nodes, delete.

const modelsView = { body: el("tbody"), pulls: el("ul", { class: "pulls" }), empty: el("p", { class: "empty" }, "No node lists a model."), open: null };
const STORE_KINDS = new Set(["ollama"]);  // kinds of server whose models can be changed
const hasStore = (node) => STORE_KINDS.has(node.backend.kind) && node.backend.state === "up";

/** One row for each name: on which nodes, with which digests, where in memory. */
function listModels(status) {
  const rows = new Map();
  for (const node of status.nodes) {
    if (node.backend.state !== "up") continue;
    const details = new Map(node.backend.catalog.map((info) => [info.name, info])), loaded = new Map(node.backend.loaded.map((model) => [model.name, model]));
    for (const name of new Set([...node.backend.models, ...loaded.keys()])) {
      if (!rows.has(name)) rows.set(name, { name, copies: [], size_mib: null, kind: "", digests: new Set(), loaded: 0 });
      const row = rows.get(name), info = details.get(name) || {};
      row.copies.push({ node: node.name, digest: info.digest || null, loaded: loaded.get(name) || null, store: hasStore(node) });
      row.size_mib = row.size_mib === null ? info.size_mib ?? null : row.size_mib;
      row.kind = row.kind || [info.parameter_size, info.quantization].filter(Boolean).join(" ");
      row.embeds = row.embeds || /bert|embed/i.test((info.family || "") + " " + name);
      if (info.digest) row.digests.add(info.digest);
      if (loaded.has(name)) row.loaded += 1;
    }
  }
  return [...rows.values()].sort((a, b) => a.name.localeCompare(b.name));
}

const modelRows = new KeyedList(modelsView.body, (row) => row.name, (name) => {
  const button = el("button", { type: "button", class: "plain", click: () => openModel(name) }, name);
  const cells = ["size right", "kind", "where", "memory"].map((part) => el("td", { class: "c-" + part }));
  const chips = new KeyedList(cells[2], (copy) => copy.node, () => {
    const box = el("span", { class: "chip" });
    return { box, show(copy) {
      setText(box, copy.node);
      setClass(box, copy.loaded ? "chip in-memory" : "chip");
      box.title = copy.loaded ? "in memory" : "on disk";
    } };
  });
  const odd = el("span", { class: "warn block" });
  return { box: el("tr", {}, el("th", { scope: "row", class: "c-name" }, button, odd), ...cells), show(row) {
    setText(odd, row.digests.size > 1 ? "differs between nodes" : "");
    odd.hidden = row.digests.size < 2;
    setText(cells[0], gib(row.size_mib));
    setText(cells[1], row.kind || UNKNOWN);
    chips.show(row.copies);
    setText(cells[3], row.loaded ? count(row.loaded, "node") : UNKNOWN);
  } };
});

$("view-models").append(
  el("h2", { id: "models-title", tabindex: "-1" }, "Models"),
  el("form", { id: "pull-form", class: "inline-form", hidden: true },
    el("label", { for: "pull-model" }, "Pull"), el("input", { id: "pull-model", required: true, placeholder: "qwen2.5:7b", autocomplete: "off", spellcheck: "false" }),
    el("label", { for: "pull-node" }, "to"), el("select", { id: "pull-node" }), el("button", { class: "primary" }, "Pull")),
  el("p", { id: "models-read-only", class: "soft" }, "Read-only: see ", el("a", { href: "#/connect" }, "Connect"), " for how changes are allowed."),
  modelsView.pulls, modelsView.empty,
  el("div", { class: "table-box", id: "models-box" }, el("table", { class: "models", "aria-labelledby": "models-title" },
    el("thead", {}, el("tr", {}, ...[["Model", "name"], ["GiB", "size right"], ["Kind", "kind"], ["On (filled: in memory)", "where"], ["In memory", "memory"]]
      .map(([text, name]) => el("th", { scope: "col", class: "c-" + name }, text)))), modelsView.body)),
);
$("pull-form").addEventListener("submit", (event) => {
  event.preventDefault();
  pullModel($("pull-model").value.trim(), $("pull-node").value);
  $("pull-model").value = "";
});

function showModels(status) {
  if (!$("view-models").hidden) {
    const rows = listModels(status);
    modelRows.show(rows);
    $("models-box").hidden = !rows.length;
    modelsView.empty.hidden = rows.length > 0;
    const stores = status.nodes.filter(hasStore).map((node) => node.name);
    $("pull-form").hidden = !gateway.page.writable || !stores.length;
    $("models-read-only").hidden = gateway.page.writable;
    const options = ["", ...stores], select = $("pull-node");
    if (options.join("\n") !== [...select.options].map((option) => option.value).join("\n")) {
      const chosen = select.value;
      select.replaceChildren(...options.map((name) => el("option", { value: name }, name || "all nodes (" + stores.length + ")")));
      select.value = options.includes(chosen) ? chosen : "";
    }
  }
  if ($("model-dialog").open) showModelDialog();
}

// -- pulls -----------------------------------------------------------------------------------------------------------

/** Pulls a model, and shows the progress of all its parts as one bar. ``node``: "" for all nodes. */
async function pullModel(model, node) {
  if (!model) return;
  const meter = new Meter("pulled", { bare: true }), text = el("span", { class: "soft" }, "starts …"), stop = new AbortController();
  const button = el("button", { type: "button", class: "small" }, "Stop");
  const item = el("li", {}, el("strong", {}, model), el("span", {}, " to " + (node || "all nodes")), meter.box, text, button);
  button.addEventListener("click", () => {
    stop.abort();
    item.remove();
  });
  modelsView.pulls.append(item);
  const parts = new Map();
  try {
    let last = {};
    for await (const line of streamLines("/api/pull", { method: "POST", body: { model }, headers: onNode(node), signal: stop.signal })) {
      if (!line) continue;
      last = JSON.parse(line);
      if (last.error) throw new Error(last.error);
      if (last.digest) parts.set(last.digest, [last.completed || 0, last.total || 0]);
      const [completed, total] = [...parts.values()].reduce((sum, part) => [sum[0] + part[0], sum[1] + part[1]], [0, 0]);
      const percent = last.status === "success" ? 100 : percentOf(completed, total);
      meter.show(percent, percent === null ? "" : number(percent, 0, " %"));
      setText(text, last.digest ? (completed / 2 ** 30).toFixed(1) + " of " + (total / 2 ** 30).toFixed(1) + " GiB" : last.status || "");
    }
    if (last.status !== "success") throw new Error("it ended before it was done");
    setText(text, "done");
    say(model + " is pulled");
    button.textContent = "Dismiss";
  } catch (problem) {
    if (stop.signal.aborted) return;
    setClass(text, "bad");
    setText(text, problem.message);
    button.textContent = "Dismiss";
    say("pull of " + model + " failed: " + problem.message);
  }
}

// -- one model on all nodes ------------------------------------------------------------------------------------------

const modelDialog = $("model-dialog");

function openModel(name) {
  modelsView.open = name;
  const body = el("tbody"), close = el("button", { type: "button", click: () => modelDialog.close() }, "Close");
  const sync = el("button", { type: "button" }, "Pull where it is missing or differs");
  modelsView.dialog = { body, sync, working: new Set(), note: el("p", { class: "soft" }), problem: el("p", { class: "bad", role: "alert" }) };
  modelsView.dialog.rows = new KeyedList(body, (each) => each.node, (node) => makeCopyRow(name, node));
  sync.addEventListener("click", () => {
    modelDialog.close();
    for (const node of modelsView.dialog.lacking) pullModel(name, node);
    location.hash = "#/models";
  });
  modelDialog.replaceChildren(
    el("h2", { id: "model-title" }, name), modelsView.dialog.note, modelsView.dialog.problem,
    el("div", { class: "table-box" }, el("table", { class: "copies" }, el("thead", {}, el("tr", {}, ...["Node", "State", "Digest", ""].map((text) => (text ? el("th", { scope: "col" }, text) : el("td"))))), body)),
    el("div", { class: "actions end" }, sync, close));
  showModelDialog();
  modelDialog.showModal();
}

function makeCopyRow(model, node) {
  const cells = [el("td"), el("td", { class: "mono soft" }), el("td", { class: "actions" })];
  const buttons = {};
  const add = (name, label, action) => {
    buttons[name] = el("button", { type: "button", class: "small", "aria-label": label + " " + model + " on " + node, click: () => runOnCopy(label, model, node, action) }, label);
    cells[2].append(buttons[name]);
  };
  add("load", "Load", (row) => (row.embeds
    ? ask("/api/embed", { method: "POST", headers: onNode(node), body: { model, input: "" } })
    : ask("/api/generate", { method: "POST", headers: onNode(node), body: { model, stream: false } })));
  add("unload", "Unload", () => ask("/api/generate", { method: "POST", headers: onNode(node), body: { model, keep_alive: 0, stream: false } }));
  add("copy", "Pull here", null);
  add("delete", "Delete", () => ask("/api/delete", { method: "DELETE", headers: onNode(node), body: { model } }));
  return { box: el("tr", {}, el("th", { scope: "row" }, node), ...cells), show(copy) {
    const working = modelsView.dialog.working.has(node);
    setText(cells[0], working ? "working …" : copy.away ? copy.away : copy.loaded ? "in memory, " + loadedText(copy.loaded, state.status.at) : copy.has ? "on disk" : "not there");
    setText(cells[1], copy.digest ? copy.digest.replace(/^sha256:/, "").slice(0, 12) : "");
    const allowed = gateway.page.writable && copy.store && !working;
    buttons.load.hidden = !(allowed && copy.has && !copy.loaded);
    buttons.unload.hidden = !(allowed && copy.loaded);
    buttons.copy.hidden = !(allowed && (!copy.has || copy.differs));
    buttons.delete.hidden = !(allowed && copy.has);
  } };
}

function showModelDialog() {
  const name = modelsView.open, { rows, sync, note } = modelsView.dialog;
  const row = listModels(state.status).find((each) => each.name === name) || { copies: [], digests: new Set(), kind: "" };
  modelsView.dialog.row = row;
  const byNode = new Map(row.copies.map((copy) => [copy.node, copy]));
  const counts = new Map();
  for (const { digest } of row.copies) if (digest) counts.set(digest, (counts.get(digest) || 0) + 1);
  const usual = [...counts].sort((a, b) => b[1] - a[1]).map(([digest]) => digest)[0];
  const copies = state.status.nodes.map((node) => {
    const copy = byNode.get(node.name);
    const away = node.backend.state === "up" ? "" : "cannot be asked: " + (node.reason || node.health);
    return { node: node.name, has: Boolean(copy), loaded: copy && copy.loaded, digest: copy && copy.digest, differs: Boolean(copy && copy.digest && copy.digest !== usual), store: hasStore(node), away };
  });
  rows.show(copies);
  modelsView.dialog.lacking = copies.filter((copy) => copy.store && (!copy.has || copy.differs)).map((copy) => copy.node);
  sync.hidden = !gateway.page.writable || !modelsView.dialog.lacking.length || !row.copies.length;
  setText(note, [row.kind, isKnown(row.size_mib) ? gib(row.size_mib) + " GiB" : "", row.digests.size > 1 ? "not the same on all nodes" : ""].filter(Boolean).join(" · "));
}

async function runOnCopy(label, model, node, action) {
  const dialog = modelsView.dialog;
  setText(dialog.problem, "");
  if (action === null) {
    modelDialog.close();
    location.hash = "#/models";
    pullModel(model, node);
    return;
  }
  if (label === "Delete" && !(await confirmed("Delete this model?", model + " leaves the disk of " + node + ".", "Delete it"))) return;
  dialog.working.add(node);
  showModelDialog();
  try {
    await action(dialog.row);
    say(label + " " + model + " on " + node + ": done");
  } catch (problem) {
    setText(dialog.problem, label + " on " + node + ": " + problem.message);
  }
  dialog.working.delete(node);
  showModelDialog();
}
