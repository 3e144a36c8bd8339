"use strict";
// The requests in flight: who asks for what, where it runs, how far it is; and their cancel.

const requestsView = { body: el("tbody"), empty: el("p", { class: "empty" }), others: el("p", { class: "soft" }), more: el("p", { class: "soft" }) };
const PHASES = { waiting: "waits for a slot", reading: "reads the prompt", writing: "writes", working: "works" };

$("view-requests").append(
  el("h2", { id: "requests-title", tabindex: "-1" }, "Requests in flight"),
  el("div", { class: "table-box", id: "requests-box" }, el("table", { class: "requests", "aria-labelledby": "requests-title" },
    el("thead", {}, el("tr", {}, ...[["Who", "who"], ["Model", "model"], ["Node", "node"], ["State", "phase"], ["Tokens", "tokens right"], ["For", "age right"], ["Forecast", "forecast"], ["", "act"]]
      .map(([text, name]) => (text ? el("th", { scope: "col", class: "c-" + name }, text) : el("td", { class: "c-" + name }))))),
    requestsView.body)),
  requestsView.empty, requestsView.more, requestsView.others,
);

function makeRequestRow(number_) {
  const cells = {};
  for (const name of ["who", "model", "node", "phase", "tokens", "age", "forecast", "act"]) {
    cells[name] = el("td", { class: "c-" + name + (["tokens", "age"].includes(name) ? " right" : "") });
  }
  const who = el("strong"), detail = el("span", { class: "soft block" }), meter = new Meter("of the forecast time", { bare: true });
  const cancel = el("button", { type: "button", class: "small", click: () => cancelRequest(number_) }, "Cancel");
  const node = el("a");
  cells.who.append(who, detail);
  cells.forecast.append(meter.box);
  cells.act.append(cancel);
  cells.node.append(node);
  const row = { box: el("tr", {}, ...Object.values(cells)), show(request) {
    row.request = request;
    setText(who, request.client || "somebody");
    const from = [request.key && request.key !== request.client ? "key " + request.key : "", request.address && request.address !== request.client ? request.address : "", request.id ? "id " + request.id : ""];
    setText(detail, from.filter(Boolean).join(" · "));
    setText(cells.model, request.model || request.method + " " + request.path);
    cells.model.title = request.path;
    setText(node, request.node || UNKNOWN);
    if (request.node) node.href = nodeLink(request.node);
    else node.removeAttribute("href");
    const more = [request.priority && request.priority !== "normal" ? request.priority : "", request.attempts > 1 ? "attempt " + request.attempts : "",
      request.continuations ? "continued " + request.continuations + " ×" : "", request.queue_s >= 0.1 && request.phase !== "waiting" ? "waited " + duration(request.queue_s) : ""];
    setText(cells.phase, [PHASES[request.phase] || request.phase, ...more.filter(Boolean)].join(", "));
    cells.phase.classList.toggle("warn", request.phase === "waiting");
    setText(cells.tokens, request.tokens === null ? UNKNOWN : String(request.tokens));
    setText(cells.age, duration(request.age_s));
    showForecast(meter, request);
    cancel.hidden = !gateway.page.writable;
    cancel.setAttribute("aria-label", "Cancel request " + number_ + " of " + (request.client || "somebody"));
  } };
  return row;
}

/** How much of the forecast time has passed since the request came to its node. */
function showForecast(meter, request) {
  const hidden = !isKnown(request.forecast_s) || !isKnown(request.remaining_s);
  meter.box.hidden = hidden;
  if (hidden) return;
  const left = request.remaining_s;
  meter.show(100 * Math.min(1, Math.max(0, 1 - left / Math.max(request.forecast_s, 0.001))), left >= 0 ? duration(left) + " left" : duration(-left) + " over");
}

const requestRows = new KeyedList(requestsView.body, (request) => request.number, makeRequestRow);

function showRequests(live, status) {
  const { requests } = live;
  $("request-count").hidden = !live.count;
  setText($("request-count"), String(live.count));
  if ($("view-requests").hidden) return;
  requestRows.show(requests);
  $("requests-box").hidden = !requests.length;
  const ended = live.recent.ended ? " " + count(live.recent.ended, "request") + " ended in the last 5 minutes." : "";
  setText(requestsView.empty, requests.length ? "" : "Nothing is in flight." + ended);
  setText(requestsView.more, live.count > requests.length ? "These are the oldest; " + (live.count - requests.length) + " more are in flight." : "");
  const inMesh = status ? status.gateway.in_flight + status.gateway.queued : 0;
  const inference = requests.filter((request) => request.phase !== "working").length;
  const others = live.count <= requests.length ? inMesh - inference : 0;
  setText(requestsView.others, others > 0 ? count(others, "more") + " from commands of this machine (gpumesh run, bench): they do not come through the gateway." : "");
}

async function cancelRequest(number_) {
  const row = requestRows.rows.get(number_);
  const request = row && row.request;
  if (!request) return;
  const text = (request.client || "Somebody") + " asked " + (request.node || "the mesh") + " for " + (request.model || request.path) + ", " + duration(request.age_s) + " ago. The client gets an error; the node is free at once.";
  if (await confirmed("Cancel this request?", text, "Cancel the request")) {
    await change("cancel request " + number_, () => ask("/mesh/requests/" + number_ + "/cancel", { method: "POST" }));
  }
}
