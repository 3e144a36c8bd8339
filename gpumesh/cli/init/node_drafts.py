"""The nodes that `init` proposes: made from ssh lines, aliases, pods and this machine's ports, then probed. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.cli.init.provider_pods import Pod
from gpumesh.cli.init.ssh_command_line import SshLine
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.state import BackendPhase, NodeState

# Ports of inference servers on a host, in this order: Ollama, any server behind a provider's proxy, llama.cpp, vLLM, LM
# Studio.
HOST_PORTS = (11434, 80, 8080, 8000, 1234)
# Ports of inference servers on this machine, or of tunnels to inference servers. Each port becomes a node.
LOCAL_PORTS = (11434, 11435, 8080, 8081, 8000, 1234)
LOCAL_NODE_NAME = "local"

SshValues = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A node as it will be in the file. ``ssh`` has the keys and values of its mapping ``ssh``; it is ``None`` for a
    server on this machine. ``state`` is the result of a probe. ``note`` becomes a comment."""

    name: str
    ssh: SshValues | None
    ports: tuple[int, ...] = HOST_PORTS
    state: NodeState | None = None
    note: str | None = None

    @property
    def is_serving(self) -> bool:
        return self.state is not None and self.state.backend.state is BackendPhase.UP


def make_drafts(
    lines: Sequence[SshLine], aliases: Sequence[str], pods: Sequence[Pod] = (), *, identity: str | None = None
) -> list[Draft]:
    """One draft for each host and one for each usual port of this machine, with unique names. ``identity`` is the key
    file for hosts without a key file of their own."""
    drafts: list[Draft] = []
    for line in lines:
        ssh: dict[str, str | int] = {"host": line.host, "port": line.port}
        for key, value in (("user", line.user), ("identity_file", line.identity), ("proxy_jump", line.jump)):
            if value is not None:
                ssh[key] = value
        drafts.append(Draft(line.name, ssh, ports=tuple(dict.fromkeys((*line.forwarded_ports, *HOST_PORTS)))))
    drafts += [Draft(node_name(alias), {"alias": alias}) for alias in aliases]
    for pod in pods:
        if pod.host is not None:
            note = f"{pod.provider}: its address changes when it restarts; `address_from` can look it up each time"
            values: dict[str, str | int] = {"host": pod.host, "port": pod.port, "user": "root"}
            drafts.append(Draft(node_name(pod.name), values, note=note))
    if identity is not None:
        drafts = [replace(draft, ssh={"identity_file": identity, **(draft.ssh or {})}) for draft in drafts]
    drafts += [
        Draft(LOCAL_NODE_NAME if port == LOCAL_PORTS[0] else f"{LOCAL_NODE_NAME}-{port}", None, ports=(port,))
        for port in LOCAL_PORTS
    ]
    return _with_unique_names(drafts)


def _with_unique_names(drafts: Sequence[Draft]) -> list[Draft]:
    used_names: set[str] = set()
    renamed = []
    for draft in drafts:
        name, number = draft.name, 2
        while name in used_names:
            name, number = f"{draft.name}-{number}", number + 1
        used_names.add(name)
        renamed.append(replace(draft, name=name))
    return renamed


def node_name(text: str) -> str:
    """The letters, digits and hyphens of ``text``, in lower case."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]
    return name or "node"


def summarize_draft(draft: Draft) -> str:
    """The result of the probe as one line."""
    node = draft.state
    if node is None or not draft.is_serving:
        return clean_line(f"{draft.name}: {node.reason if node is not None and node.reason else 'no answer'}")
    backend = node.backend
    gpus = Counter(gpu.name for gpu in node.gpus or ())
    cards = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in gpus.items()) or "no GPU seen"
    models = f"{len(backend.models)} model{'' if len(backend.models) == 1 else 's'}"
    server = f"{backend.kind} {backend.version or ''}"
    return clean_line(f"{draft.name}: {server} on port {draft.ports[0]}, {cards}, {models}")
