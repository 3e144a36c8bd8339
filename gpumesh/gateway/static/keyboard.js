"use strict";
// The keyboard: "?" shows what there is. No key of the page works while a person types, or together with Ctrl, Alt or Meta.

const VIEW_KEYS = { 1: "#/", 2: "#/requests", 3: "#/models", 4: "#/connect", 5: "#/usage" };
const SHORTCUTS = [
  ["?", "this help"],
  ["1 2 3 4", "Overview, Requests, Models, Connect (5: Usage)"],
  ["/", "filter the nodes"],
  ["j k or ↓ ↑", "next and previous node, request or model"],
  ["Enter", "open it"],
  ["t", "nodes as cards or as a table"],
  ["[ ]", "shorter and longer range of the plots"],
  ["← →", "in a plot: read its values"],
  ["Esc", "close, clear the filter, back to all nodes"],
];

$("help").append(
  el("h2", { id: "help-title" }, "Keyboard"),
  el("dl", { class: "shortcuts" }, ...SHORTCUTS.flatMap(([keys, text]) => [el("dt", {}, ...keys.split(" ").map((key) => (key === "or" ? " or " : el("kbd", {}, key)))), el("dd", {}, text)])),
  el("div", { class: "actions end" }, el("button", { type: "button", autofocus: true, click: () => $("help").close() }, "Close")),
);
$("help-button").addEventListener("click", () => $("help").showModal());

/** What can be chosen in the view that is shown: the links of nodes, the buttons of requests and models. */
function choices() {
  const view = document.querySelector(".view:not([hidden])");
  return view ? [...view.querySelectorAll("#cards h3 a, table.nodes th a, table.requests tbody .c-node a[href], table.models th button")].filter((each) => each.offsetParent) : [];
}

function move(by) {
  const all = choices();
  if (!all.length) return;
  const at = all.findIndex((each) => each === document.activeElement);
  const next = at < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + by, 0), all.length - 1);
  all[next].focus();
}

function changeRange(by) {
  const at = RANGES.findIndex(([seconds]) => seconds === past.range);
  setRange(RANGES[Math.min(Math.max(at + by, 0), RANGES.length - 1)][0]);
}

function handleEscape() {
  if ($("filter").value) {
    $("filter").value = "";
    showNodes(nodesView.nodes);
  } else if (nodeView.name !== null) location.hash = "#/";
  else if (document.activeElement) document.activeElement.blur();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || document.querySelector("dialog[open]") || $("content").hidden) return;
  const target = event.target;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape" && target === $("filter")) {
      handleEscape();
      target.blur();
    } else if (target === $("filter") && event.key === "Enter") move(1);
    return;
  }
  const actions = {
    "?": () => $("help").showModal(), "/": () => { location.hash = "#/"; $("filter").hidden = false; $("filter").focus(); },
    j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1), t: () => showNodesAs($("table-box").hidden ? "table" : "cards"),
    "[": () => changeRange(-1), "]": () => changeRange(1), Escape: handleEscape,
  };
  if (event.key.startsWith("Arrow") && !choices().includes(target)) return;  // they scroll the page
  if (event.key in VIEW_KEYS && !(event.key === "5" && $("usage-tab").hidden)) location.hash = VIEW_KEYS[event.key];
  else if (event.key in actions) actions[event.key]();
  else return;
  event.preventDefault();
});
