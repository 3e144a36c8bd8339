"use strict";
// What is asked of the gateway: the stream of events, the past, and changes. Nothing else is asked of anybody.

const KEY_ITEM = "gpumesh-key";

const gateway = {
  key: sessionStorage.getItem(KEY_ITEM),
  page: { writable: false, key_set: false, key: null, log: false },
  isLive: false,
};

const authorization = () => (gateway.key ? { Authorization: "Bearer " + gateway.key } : {});

/** Asks for a document. Throws an Error with the gateway's own message. */
async function ask(path, { method = "GET", headers = {}, body } = {}) {
  const answer = await fetch(path, {
    method, cache: "no-store",
    headers: { ...authorization(), ...headers, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  let document_ = null;
  try {
    document_ = text ? JSON.parse(text) : null;
  } catch (problem) { /* no JSON: the status says enough */ }
  if (!answer.ok) {
    const error = document_ && document_.error;
    const problem = new Error((typeof error === "string" ? error : error && error.message) || "HTTP " + answer.status);
    problem.status = answer.status;
    throw problem;
  }
  return document_;
}

/** Runs a change, and says how it went. Returns whether it worked. */
async function change(text, action) {
  showFailure("");
  try {
    await action();
    say(text + ": done");
    return true;
  } catch (problem) {
    showFailure(text + ": " + problem.message);
    return false;
  }
}

function showFailure(text) {
  setText($("failure"), text);
  $("failure").hidden = !text;
}

const changeNode = (name, action) =>
  change(action + " " + name, () => ask("/mesh/nodes/" + encodeURIComponent(name) + "/" + action, { method: "POST" }));

const onNode = (node) => (node ? { "X-GPUMesh-Node": node } : {});

/** Yields the lines of an answer as they come. Throws an Error if the gateway refuses. */
async function* streamLines(path, { method = "GET", headers = {}, body, signal } = {}) {
  const answer = await fetch(path, {
    method, cache: "no-store", signal,
    headers: { ...authorization(), ...headers, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!answer.ok) {
    const problem = new Error(((await answer.json().catch(() => null)) || {}).error || "HTTP " + answer.status);
    problem.status = answer.status;
    throw problem;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    yield* lines;
  }
  if (text) yield text;
}

/** Follows the events until the gateway ends them. ``take(event, document)`` gets each. fetch and not EventSource, which
 *  cannot send a key. */
async function followEvents(take) {
  let event = "message", data = "";
  for await (const line of streamLines("/mesh/events")) {
    if (line === "") {
      if (data) take(event, JSON.parse(data));
      event = "message";
      data = "";
    } else if (line.startsWith("event: ")) event = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
}

function useKey(key) {
  gateway.key = key;
  if (key) sessionStorage.setItem(KEY_ITEM, key);
  else sessionStorage.removeItem(KEY_ITEM);
}
