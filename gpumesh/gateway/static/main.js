"use strict";
// The page's state, its views by the address after "#", and its connection to the gateway.

const DRAW_INTERVAL_MS = 2000;
const state = { status: null, live: null };
const VIEWS = ["overview", "node", "requests", "models", "usage", "connect"];

// -- views -----------------------------------------------------------------------------------------------------------

/** The view that the address names, and the node of a node's view. */
function readAddress() {
  const [view, name] = location.hash.replace(/^#\/?/, "").split("/");
  if (view === "nodes" && name) {
    try {
      return { view: "node", node: decodeURIComponent(name) };
    } catch (problem) {
      return { view: "overview" };
    }
  }
  return { view: VIEWS.includes(view) && view !== "node" ? view : "overview" };
}

let viewShown = null;

function showView() {
  const { view, node } = readAddress();
  for (const each of VIEWS) $("view-" + each).hidden = each !== view;
  for (const tab of $("tabs").children) {
    if (tab.dataset.view === view || (view === "node" && tab.dataset.view === "overview")) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  closeNodeView();
  if (view === "node") openNodeView(node);
  if (view === "usage") loadUsage();
  showStatus();
  const title = $("view-" + view).querySelector("h2");
  if (viewShown !== null && title) {  // a screen reader reads the new view; at the first sight it reads the page
    scrollTo(0, 0);
    title.focus({ preventScroll: true });
  }
  viewShown = view;
}

let drawn = 0;

function drawCharts() {
  drawn = performance.now();
  if (!$("view-overview").hidden) overviewCharts.forEach((chart) => chart.draw());
  else if (nodeView.name !== null) nodeView.charts.forEach((chart) => chart.draw());
}

function showStatus() {
  const { status, live } = state;
  if (!status) return;
  setText($("mesh"), status.mesh);
  document.title = status.totals.nodes_up + "/" + status.totals.nodes + " up · " + status.mesh + " · gpumesh";
  learnLabels(status);
  showSummary(status, live);
  if (!$("view-overview").hidden) {
    showFindings(status.findings);
    showNodes(status.nodes);
  }
  showNodeView();
  showModels(status);
  if (live) showRequests(live, status);
  showConnect();
  if (performance.now() - drawn > DRAW_INTERVAL_MS) drawCharts();
}

// -- the stream ------------------------------------------------------------------------------------------------------

function showLive(text, tone) {
  setText($("live"), text);
  setClass($("live"), tone);
}

function takeEvent(event, data) {
  if (event === "hello") {
    gateway.page = data;
    gateway.isLive = true;
    $("ask").hidden = true;
    $("content").hidden = $("tabs").hidden = false;
    showLive("● live", "good");
    loadPast();
    if (nodeView.name !== null) loadNodeLog();
    loadUsage();
  } else if (event === "live") {
    state.live = data;
    if (state.status) {
      showSummary(state.status, data);
      showRequests(data, state.status);
    }
  } else if (event === "status") {
    state.status = data;
    sayHealth(data.nodes);
    showStatus();
  }
}

function askForKey() {
  $("content").hidden = $("tabs").hidden = true;
  $("ask").hidden = false;
  setText($("ask-problem"), gateway.key ? "This key is not the right one." : "");
  showLive("waiting for a key", "soft");
  $("key").focus();
}

async function stay() {
  for (;;) {
    let wasLive = false;
    try {
      await followEvents(takeEvent);
      wasLive = gateway.isLive;  // the gateway has ended the stream: it stops, or its keys have changed
    } catch (problem) {
      if (problem.status === 401) {
        gateway.isLive = false;
        askForKey();
        return;
      }
    }
    gateway.isLive = false;
    if (wasLive) continue;
    showLive("✗ the gateway is away, trying again …", "bad");
    await new Promise((later) => setTimeout(later, 1000));
  }
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  stay();
});
addEventListener("hashchange", showView);
for (const box of document.querySelectorAll(".ranges")) fillRanges(box);
$("plots").append(...overviewCharts.map((chart) => chart.box));
past.listeners.add(drawCharts);
showView();
stay();
