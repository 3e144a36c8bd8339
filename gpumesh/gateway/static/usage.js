"use strict";
// Who has used how much: by key, model, node or day. The view is hidden where the gateway counts no usage.

const USAGE_WORDS = ["key", "model", "node", "day"];
const SINCE = [["1d", "Today"], ["7d", "7 days"], ["30d", "30 days"], ["90d", "90 days"]];
const USAGE_POLL_MS = 15000;

const usageView = { by: "key", since: "30d", timer: 0, body: el("tbody"), foot: el("tfoot"), head: el("th", { scope: "col" }, "key"), budgets: el("ul", { class: "budgets" }), empty: el("p", { class: "empty" }), note: el("p", { class: "soft small-text" }) };
const large = (value) => (isKnown(value) ? value.toLocaleString("en-US").replaceAll(",", " ") : UNKNOWN);  // thin spaces

const usageCells = (row) => [large(row.requests), large(row.failed), large(row.cancelled), large(row.prompt_tokens), large(row.completion_tokens), large(row.tokens),
  duration(row.gpu_seconds), row.energy_wh === null ? UNKNOWN : row.energy_wh < 1000 ? number(row.energy_wh, 1, " Wh") : number(row.energy_wh / 1000, 2, " kWh")];

/** The name in a row: requests without a key have none. */
const usageName = (row) => row[usageView.by] || (usageView.by === "key" ? "without a key" : UNKNOWN);

const usageRows = new KeyedList(usageView.body, (row) => row[usageView.by], () => {
  const name = el("th", { scope: "row" }), cells = usageCells({}).map(() => el("td", { class: "right" }));
  return { box: el("tr", {}, name, ...cells), show(row) {
    setText(name, usageName(row));
    usageCells(row).forEach((text, place) => setText(cells[place], text));
  } };
});

const budgetItems = new KeyedList(usageView.budgets, (budget) => budget.key, (key) => {
  const meter = new Meter("budget of " + key, { bare: true }), text = el("span", { class: "soft" });
  return { box: el("li", { class: "tile" }, el("strong", {}, key), meter.box, text), show(budget) {
    const limit = budget.tokens_per_month;
    meter.box.hidden = !isKnown(limit);
    meter.show(percentOf(budget.used_tokens, limit), isKnown(limit) ? number(percentOf(budget.used_tokens, limit), 0, " %") : "");
    const resets = new Date(budget.resets_at).toISOString().slice(0, 10);
    setText(text, (isKnown(limit) ? large(budget.used_tokens) + " of " + large(limit) + " tokens in " + budget.month + ", anew on " + resets : "no budget of tokens")
      + (budget.rate ? "; at most " + budget.rate + " requests" : ""));
  } };
});

function usageChoice(label, options, current, choose) {
  const box = el("div", { class: "choice", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    box.append(el("button", { type: "button", "aria-pressed": String(value === current), click: (event) => {
      for (const each of box.children) each.setAttribute("aria-pressed", String(each === event.currentTarget));
      choose(value);
      loadUsage();
    } }, text));
  }
  return box;
}

$("view-usage").append(
  el("div", { class: "title-row" }, el("h2", { id: "usage-title", tabindex: "-1" }, "Usage"),
    usageChoice("Usage by", USAGE_WORDS.map((word) => [word, "by " + word]), usageView.by, (value) => { usageView.by = value; }),
    usageChoice("Since", SINCE, usageView.since, (value) => { usageView.since = value; })),
  usageView.budgets, usageView.empty,
  el("div", { class: "table-box", id: "usage-box" }, el("table", { "aria-labelledby": "usage-title" },
    el("thead", {}, el("tr", {}, usageView.head, ...["Requests", "Failed", "Cancelled", "Prompt tokens", "Answer tokens", "Tokens", "GPU time", "Energy"].map((text) => el("th", { scope: "col", class: "right" }, text)))),
    usageView.body, usageView.foot)),
  usageView.note,
);

async function loadUsage() {
  clearTimeout(usageView.timer);
  const { by, since } = usageView;
  try {
    const usage = await ask("/mesh/usage?by=" + by + "&since=" + since);
    $("usage-tab").hidden = false;
    if (by === usageView.by && since === usageView.since) showUsage(usage);
  } catch (problem) {
    if (problem.status === 404) $("usage-tab").hidden = true;
    else if (!$("view-usage").hidden) setText(usageView.empty, "The figures cannot be had now: " + problem.message);
  }
  if (!$("view-usage").hidden) usageView.timer = setTimeout(loadUsage, USAGE_POLL_MS);
}

function showUsage(usage) {
  setText(usageView.head, usageView.by[0].toUpperCase() + usageView.by.slice(1));
  usageRows.show([]);  // the rows of another word have other names
  usageRows.show(usage.rows);
  budgetItems.show(usage.budgets || []);
  usageView.budgets.hidden = !(usage.budgets || []).length;
  $("usage-box").hidden = !usage.rows.length;
  setText(usageView.empty, usage.rows.length ? "" : "Nothing was asked since " + usage.since + ".");
  usageView.empty.hidden = usage.rows.length > 0;
  usageView.foot.replaceChildren(el("tr", {}, el("th", { scope: "row" }, "All"), ...usageCells(usage.total).map((text) => el("td", { class: "right" }, text))));
  usageView.foot.hidden = usage.rows.length < 2;
  const guessed = usage.total.estimated_requests;
  setText(usageView.note, "Days are in UTC." + (guessed ? " Of " + count(guessed, "request") + " the server told no counts: tokens are estimated from the stream." : ""));
}
