"use strict";
// How programs use the mesh: the endpoint, variables for shells, an example; and what a key is for.

const PLACEHOLDER_KEY = "gpumesh";  // the packages of OpenAI and Anthropic want some key, even if none is needed
const SHELLS = {
  "sh, bash, zsh": (name, value) => "export " + name + "=" + value,
  fish: (name, value) => "set -gx " + name + " " + value,
  PowerShell: (name, value) => "$env:" + name + ' = "' + value + '"',
};

const connectView = { shell: "sh, bash, zsh", env: el("pre", { tabindex: "0", "aria-label": "Variables" }), curl: el("pre", { tabindex: "0", "aria-label": "Example" }), keyBox: el("div", { class: "stack" }) };

/** A text that can be copied. Only what this page has made itself gets such a button, nothing that a host has sent. */
function copyable(what, box) {
  return el("div", { class: "copyable" }, box, copyButton(what, () => box.textContent));
}

const endpoint = () => location.origin;

function variables() {
  const url = endpoint();
  const pairs = [["OLLAMA_HOST", url], ["OPENAI_BASE_URL", url + "/v1"], ["ANTHROPIC_BASE_URL", url]];
  if (gateway.page.key_set) return [...pairs, ["OPENAI_API_KEY", "YOUR-KEY"], ["ANTHROPIC_API_KEY", "YOUR-KEY"]];
  return [...pairs, ["OPENAI_API_KEY", PLACEHOLDER_KEY], ["ANTHROPIC_API_KEY", PLACEHOLDER_KEY]];
}

function showConnect() {
  const line = SHELLS[connectView.shell];
  setText(connectView.env, variables().map(([name, value]) => line(name, value)).join("\n"));
  const header = gateway.page.key_set ? " \\\n  -H 'Authorization: Bearer YOUR-KEY'" : "";
  setText(connectView.curl, "curl " + endpoint() + "/v1/chat/completions" + header + " \\\n  -H 'Content-Type: application/json' \\\n"
    + "  -d '{\"model\": \"MODEL\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'");
  const { writable, key_set: keySet, key } = gateway.page;
  const now = JSON.stringify(gateway.page);
  if (connectView.shown === now) return;
  connectView.shown = now;
  const forget = el("button", { type: "button", click: () => {
    useKey(null);
    location.hash = "#/";
    location.reload();
  } }, "Forget the key");
  const yaml = el("pre", { tabindex: "0", "aria-label": "Lines for mesh.yaml" }, "gateway:\n  api_key_env: GPUMESH_API_KEY");
  const lines = keySet
    ? [el("p", {}, "This tab uses the key ", el("strong", {}, key || "of the gateway"), ". "
      + (writable ? "It may drain, resume and reconnect nodes, cancel requests, and change models." : "It is limited to some nodes or models, and so changes nothing here.")),
      el("p", { class: "soft" }, "The key is in this tab only, until the tab is closed, and goes to this gateway alone."), forget]
    : [el("p", {}, "No key is set, so this page is read-only: everybody who can reach the port can open it. With a key it can drain, resume and reconnect nodes, cancel requests, and pull, load, unload and delete models."),
      el("p", {}, "Set one in mesh.yaml, put its value into that variable where the mesh runs, and start the mesh again:"), copyable("Lines for mesh.yaml", yaml),
      el("p", { class: "soft" }, "From then on programs need it too, as Authorization: Bearer … or x-api-key.")];
  connectView.keyBox.replaceChildren(...lines);
}

const shellChoice = el("div", { class: "choice", role: "group", "aria-label": "Shell" });
for (const name of Object.keys(SHELLS)) {
  const button = el("button", { type: "button", "aria-pressed": String(name === connectView.shell) }, name);
  button.addEventListener("click", () => {
    connectView.shell = name;
    for (const each of shellChoice.children) each.setAttribute("aria-pressed", String(each === button));
    showConnect();
  });
  shellChoice.append(button);
}

$("view-connect").append(
  el("h2", { tabindex: "-1" }, "Connect programs"),
  section("Endpoint", "connect-endpoint", el("p", {}, "One address for all that speaks Ollama's, OpenAI's or Anthropic's API:"),
    copyable("Endpoint", el("pre", { tabindex: "0", "aria-label": "Endpoint" }, endpoint()))),
  section("For a shell", "connect-env", el("p", {}, "The same as ", el("code", {}, "gpumesh env"), " prints:"), shellChoice, copyable("Variables", connectView.env)),
  section("Try it", "connect-curl", copyable("Example", connectView.curl)),
  section("Key and changes", "connect-key", connectView.keyBox),
);
