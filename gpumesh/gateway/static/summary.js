"use strict";
// The pool in one look: its memory as one bar, and the figures that one looks at first. Then the findings.

const summary = {
  tiles: new Map(),
  bar: el("div", { class: "pool-bar", role: "img" }),
  memory: el("strong"),
  free: el("span", { class: "soft" }),
  list: el("dl", { class: "tiles" }),
};
summary.segments = new KeyedList(summary.bar, (part) => part.label, () => {
  const fill = el("div", { class: "fill" }), box = el("div", { class: "segment" }, fill);
  return { box, show(part) {
    box.style.flexGrow = String(part.total || 1);
    fill.style.width = (percentOf(part.used, part.total) || 0) + "%";
    box.title = part.label + ": " + gib(part.used) + " of " + gib(part.total) + " GiB in use";
  } };
});
$("summary").append(
  el("div", { class: "pool" }, el("div", { class: "pool-head" }, el("span", {}, "GPU memory ", summary.memory), summary.free), summary.bar),
  summary.list,
);

function showTile(name, value, tone = "", title = "") {
  if (!summary.tiles.has(name)) {
    const tile = { term: el("dt", {}, name), detail: el("dd") };
    tile.box = el("div", {}, tile.term, tile.detail);
    summary.list.append(tile.box);
    summary.tiles.set(name, tile);
  }
  const tile = summary.tiles.get(name);
  setText(tile.detail, value);
  setClass(tile.detail, tone);
  tile.box.title = title;
}

function showSummary(status, live) {
  const total = status.totals, served = status.gateway, seen = new Set(), parts = [];
  for (const node of status.nodes) {
    const own = (node.gpus || []).filter((gpu) => !seen.has(gpu.uuid));  // a GPU that two nodes share counts once
    own.forEach((gpu) => seen.add(gpu.uuid));
    const [used, size] = memoryOf({ gpus: own });
    if (size) parts.push({ label: node.name, used, total: size });
  }
  summary.segments.show(parts);
  summary.bar.hidden = !parts.length;
  const used = gib(total.vram_used_mib) + " of " + gib(total.vram_total_mib) + " GiB in use";
  setText(summary.memory, used);
  setText(summary.free, isKnown(total.vram_free_mib) ? gib(total.vram_free_mib) + " GiB free on " + count(total.gpus, "GPU") : "no GPU is known");
  summary.bar.setAttribute("aria-label", "GPU memory of the pool: " + used);
  const away = total.nodes - total.nodes_up;
  showTile("nodes up", total.nodes_up + " / " + total.nodes, !total.nodes_up ? "bad" : away ? "warn" : "");
  showTile("tokens/s", number(total.tokens_per_s));
  showTile("in flight", String(served.in_flight));
  showTile("waiting", String(served.queued), served.queued ? "warn" : "");
  if ((status.gateways || []).length > 1) {
    const texts = status.gateways.map((one) => one.host + (one.own ? " (this one)" : "") + ": " + one.in_flight + " in flight, " + one.queued + " waiting");
    showTile("gateways", String(status.gateways.length), "", texts.join("\n"));
  }
  const recent = live ? live.recent : null;
  showTile("TTFT p50", recent ? milliseconds(recent.ttft_p50_ms) : UNKNOWN, "", recent && isKnown(recent.ttft_p50_ms)
    ? "Median time to the first token of the last 5 minutes; p90 " + milliseconds(recent.ttft_p90_ms) : "Median time to the first token; no answer has streamed in the last 5 minutes");
  showTile("requests in 5 min", recent ? String(recent.ended) : UNKNOWN);
  showTile("failed in 5 min", recent ? String(recent.failed) : UNKNOWN, recent && recent.failed ? "bad" : "");
}

// -- findings --------------------------------------------------------------------------------------------------------

const SHOWN_FINDINGS = 5;
const isAboutFile = (finding) => finding.code.startsWith("config");
let findingsShown = "", allFindings = false;

const SEVERITY_ORDER = { error: 0, warning: 1, info: 2 };
const bySeverity = (a, b) => (SEVERITY_ORDER[a.severity] ?? 3) - (SEVERITY_ORDER[b.severity] ?? 3);

function findingItem(finding) {
  return el("li", { class: "is-" + (SEVERITIES[finding.severity] || "soft") },
    el("div", { class: "finding-head" },
      el("strong", { class: SEVERITIES[finding.severity] || "" }, finding.severity),
      finding.node ? el("span", { class: "who" }, finding.node) : null,
      el("span", { class: "lines message" }, finding.message), el("span", { class: "code soft" }, finding.code)),
    finding.hint ? el("div", { class: "soft lines" }, "→ " + finding.hint) : null);
}

function showFindings(findings) {
  const now = JSON.stringify([findings, allFindings]);
  if (now === findingsShown) return;
  findingsShown = now;
  const ofFile = findings.filter(isAboutFile), others = findings.filter((finding) => !isAboutFile(finding)).sort(bySeverity);
  $("configuration").hidden = !ofFile.length;
  $("configuration-list").replaceChildren(...ofFile.map(findingItem));
  const shown = allFindings ? others : others.slice(0, SHOWN_FINDINGS);
  const items = shown.map(findingItem);
  if (!others.length) items.push(el("li", { class: "empty" }, "None: everything is as mesh.yaml expects."));
  if (others.length > SHOWN_FINDINGS) {
    items.push(el("li", { class: "more" }, el("button", { type: "button", "aria-expanded": String(allFindings), click: () => {
      allFindings = !allFindings;
      showFindings(findings);
    } }, allFindings ? "Show fewer" : "Show all " + others.length)));
  }
  $("findings").replaceChildren(...items);
}
