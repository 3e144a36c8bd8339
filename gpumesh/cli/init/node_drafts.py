"""Makes drafts of the nodes that `init` proposes, from ssh lines, aliases, pods and this machine's ports. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
class FoundServer:
    """An inference server at ``port`` of a host; ``kind`` as in mesh.yaml."""

    port: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} on port {self.port}"


@dataclass(frozen=True, slots=True)
class Draft:
    """A node as it will be in the file.

    - ``ssh``: the keys and values of the node's mapping ``ssh``; ``None`` for a server on this machine.
    - ``ports``: the ports where its server may be; after a probe only the port that answered, if one did.
    - ``state``: the result of a probe; ``None`` before a probe.
    - ``note``: a comment for the file.
    - ``others``: the servers on the same host that the node does not use.
    """

    name: str
    ssh: SshValues | None
    ports: tuple[int, ...] = HOST_PORTS
    state: NodeState | None = None
    note: str | None = None
    others: tuple[FoundServer, ...] = ()

    @property
    def is_serving(self) -> bool:
        return self.state is not None and self.state.backend.state is BackendPhase.UP


def make_drafts(
    lines: Sequence[SshLine], aliases: Sequence[str], pods: Sequence[Pod] = (), *, identity: str | None = None
) -> list[Draft]:
    """One draft for each host, as ``make_host_drafts``, then one for each usual port of this machine, with unique
    names."""
    drafts = make_host_drafts(lines, aliases, pods, identity=identity)
    first_port, *other_ports = LOCAL_PORTS
    drafts.append(Draft(LOCAL_NODE_NAME, None, ports=(first_port,)))
    drafts += [Draft(f"{LOCAL_NODE_NAME}-{port}", None, ports=(port,)) for port in other_ports]
    return with_unique_names(drafts)


def make_host_drafts(
    lines: Sequence[SshLine], aliases: Sequence[str], pods: Sequence[Pod] = (), *, identity: str | None = None
) -> list[Draft]:
    """One draft for each host. ``identity`` is the key file for hosts without a key file of their own. Leaves out pods
    that cannot be reached now."""
    drafts = [_draft_from_line(line) for line in lines]
    drafts += [Draft(node_name(alias), {"alias": alias}) for alias in aliases]
    for pod in pods:
        if pod.host is not None:
            note = f"{pod.provider}: its address changes when it restarts; `address_from` can look it up each time"
            ssh: SshValues = {"host": pod.host, "port": pod.port, "user": "root"}
            drafts.append(Draft(node_name(pod.name), ssh, note=note))
    if identity is not None:  # a key file that is set for a host itself replaces ``identity``
        drafts = [replace(draft, ssh={"identity_file": identity, **(draft.ssh or {})}) for draft in drafts]
    return drafts


def _draft_from_line(line: SshLine) -> Draft:
    """The draft of a host. The ports that the line forwards come before the usual ports."""
    ssh: dict[str, str | int] = {"alias": line.host} if line.is_alias else {"host": line.host, "port": line.port}
    for key, value in (("user", line.user), ("identity_file", line.identity), ("proxy_jump", line.jump)):
        if value is not None:
            ssh[key] = value
    ports = dict.fromkeys((*line.forwarded_ports, *HOST_PORTS))  # each port once
    return Draft(line.name, ssh, ports=tuple(ports))


def with_unique_names(drafts: Sequence[Draft], taken: Collection[str] = ()) -> list[Draft]:
    """The drafts, where a second ``gpu`` is named ``gpu-2``. ``taken`` are names that others have."""
    used_names = set(taken)
    renamed_drafts = []
    for draft in drafts:
        name, next_number = draft.name, 2
        while name in used_names:
            name = f"{draft.name}-{next_number}"
            next_number += 1
        used_names.add(name)
        renamed_drafts.append(replace(draft, name=name))
    return renamed_drafts


def node_name(text: str) -> str:
    """A name for a node: ``text`` in lower case, with a hyphen between its parts of letters and digits, at most 40
    characters. ``My pod (2)`` becomes ``my-pod-2``. ``node`` if the text has no letter and no digit."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]
    return name or "node"


def summarize_draft(draft: Draft) -> str:
    """The result of the probe as one line: the server, its port, the GPUs and the number of models; if no server
    answers, the reason."""
    node = draft.state
    if node is None:
        return clean_line(f"{draft.name}: no answer")
    if not draft.is_serving:
        return clean_line(f"{draft.name}: {node.reason or 'no answer'}")
    backend = node.backend
    counts = Counter(gpu.name for gpu in node.gpus or ())
    cards = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items()) or "no GPU seen"
    models = f"{len(backend.models)} model{'' if len(backend.models) == 1 else 's'}"
    server = f"{backend.kind} {backend.version or ''}"
    others = "".join(f"; there is also {other}" for other in draft.others)
    return clean_line(f"{draft.name}: {server} on port {draft.ports[0]}, {cards}, {models}{others}")
