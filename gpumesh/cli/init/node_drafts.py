"""The mesh.yaml that `init` writes: nodes as drafts, before and after they were looked at, and its text. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gpumesh.cli.init.provider_pods import Pod
from gpumesh.cli.init.ssh_command_line import SshLine
from gpumesh.cli.text import clean_line
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.quoting import yaml_text
from gpumesh.state import BackendPhase, NodeState
from gpumesh.topology import BackendKind

# Where inference servers listen on a host: Ollama, then behind a provider's proxy, llama.cpp, vLLM, LM Studio.
HOST_PORTS = (11434, 80, 8080, 8000, 1234)
# And here, where one may stand at the end of a tunnel that somebody else holds open: each is a server of its own.
LOCAL_PORTS = (11434, 11435, 8080, 8081, 8000, 1234)
LOCAL_NODE_NAME = "local"

SshValues = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A node as it will stand in the file. ``ssh`` are its keys and values; ``None``: a server on this machine.
    ``note``: a comment that goes with it."""

    name: str
    ssh: SshValues | None
    kind: BackendKind = BackendKind.OLLAMA
    ports: tuple[int, ...] = HOST_PORTS
    state: NodeState | None = None
    note: str | None = None

    @property
    def is_serving(self) -> bool:
        return self.state is not None and self.state.backend.state is BackendPhase.UP


def make_drafts(
    lines: Sequence[SshLine], aliases: Sequence[str], pods: Sequence[Pod] = (), *, identity: str | None = None
) -> list[Draft]:
    """One for each place and one for each usual port of this machine, each with a name of its own. ``identity``: the
    key file for places that name none."""
    made: list[Draft] = []
    for line in lines:
        ssh: dict[str, str | int] = {"host": line.host, "port": line.port}
        for key, value in (("user", line.user), ("identity_file", line.identity), ("proxy_jump", line.jump)):
            if value is not None:
                ssh[key] = value
        made.append(Draft(line.name, ssh, ports=tuple(dict.fromkeys((*line.forwarded_ports, *HOST_PORTS)))))
    made += [Draft(node_name(alias), {"alias": alias}) for alias in aliases]
    for pod in pods:
        if pod.host is not None:
            note = f"{pod.provider}: its address changes when it restarts; `address_from` can look it up each time"
            values: dict[str, str | int] = {"host": pod.host, "port": pod.port, "user": "root"}
            made.append(Draft(node_name(pod.name), values, note=note))
    if identity is not None:
        made = [replace(draft, ssh={**(draft.ssh or {}), **_missing(draft, identity)}) for draft in made]
    made += [
        Draft(LOCAL_NODE_NAME if port == LOCAL_PORTS[0] else f"{LOCAL_NODE_NAME}-{port}", None, ports=(port,))
        for port in LOCAL_PORTS
    ]
    taken: set[str] = set()
    for position, draft in enumerate(made):
        name, number = draft.name, 2
        while name in taken:
            name, number = f"{draft.name}-{number}", number + 1
        taken.add(name)
        made[position] = replace(draft, name=name)
    return made


def _missing(draft: Draft, identity: str) -> dict[str, str]:
    return {} if "identity_file" in (draft.ssh or {}) else {"identity_file": identity}


def node_name(text: str) -> str:
    """Letters, digits and hyphens, as far as ``text`` has them."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]
    return name or "node"


def summarize_draft(draft: Draft) -> str:
    """What was found, in a line for a person."""
    node = draft.state
    if node is None or not draft.is_serving:
        return clean_line(f"{draft.name}: {node.reason if node is not None and node.reason else 'no answer'}")
    backend = node.backend
    gpus = Counter(gpu.name for gpu in node.gpus or ())
    cards = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in gpus.items()) or "no GPU seen"
    models = f"{len(backend.models)} model{'' if len(backend.models) == 1 else 's'}"
    return clean_line(f"{draft.name}: {draft.kind} {backend.version or ''} on port {draft.ports[0]}, {cards}, {models}")


def default_model(made: Sequence[Draft]) -> str | None:
    """The model to chat with that most nodes have; of equal ones the first by name."""
    names: Counter[str] = Counter()
    for draft in made:
        if draft.state is None:
            continue
        families = {info.name: info.family for info in draft.state.backend.catalog}
        models = _observed(draft.state.backend.models)
        names.update(name for name in models if not is_embedding_model(name, families.get(name)))
    return min(names, key=lambda name: (-names[name], name), default=None)


# -- the file --------------------------------------------------------------------------------------------------------


def mesh_yaml_lines(made: Sequence[Draft]) -> Iterator[str]:
    """The lines of mesh.yaml. Values are JSON strings: YAML reads them the same."""
    yield "# Your GPUs, and how to reach them. `gpumesh config check` looks it over; all keys: `gpumesh config schema`."
    yield "version: 1"
    yield "name: home"
    yield ""
    yield "gateway:"
    yield "  listen: 127.0.0.1:11430   # the one address for all clients"
    model = default_model(made)
    if model is not None:
        yield f"  default_model: {_scalar(model)}   # for prompts that name none"
    yield ""
    yield "nodes:"
    for draft in made:
        yield from _node(draft)


def _node(draft: Draft) -> Iterator[str]:
    node = draft.state
    yield f"  - name: {_scalar(draft.name)}"
    if draft.note is not None:
        yield f"    # {clean_line(draft.note, 200)}"
    if node is not None and not draft.is_serving:
        yield f"    # not seen when this was written: {clean_line(node.reason or 'no answer', 200)}"
    if draft.ssh is not None:
        yield f"    ssh: {_flow(draft.ssh)}"
    kind = draft.kind.value
    if len(draft.ports) > 1:
        joined = ", ".join(_scalar(f"http://127.0.0.1:{port}") for port in draft.ports)
        yield f"    backend: {{kind: {kind}, urls: [{joined}]}}   # as the host sees them; the first that answers"
    elif draft.ssh is not None:
        yield f"    backend: {{kind: {kind}, port: {draft.ports[0]}}}   # as the host sees it"
    else:
        yield f"    backend: {{kind: {kind}, url: {_scalar(f'http://127.0.0.1:{draft.ports[0]}')}}}"
    if node is not None and draft.is_serving:
        yield from _expect(node)


def _expect(node: NodeState) -> Iterator[str]:
    """What was found becomes what is expected: `gpumesh audit` tells when it is no longer so."""
    expect: dict[str, str | int] = {}
    for hostname in _observed([node.host.hostname or ""]):
        expect["hostname"] = hostname
    if node.gpus:
        expect["gpus"] = len(node.gpus)
        if len({gpu.name for gpu in node.gpus}) == 1:
            expect["gpu"] = next(_observed([node.gpus[0].name]), "unknown GPU")
        sizes = {gpu.memory_total_mib for gpu in node.gpus}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            expect["vram_mib"] = size
    said = [f"{key}: {_scalar(value)}" for key, value in expect.items()]
    models = [_scalar(name) for name in _observed(node.backend.models)]
    if not said and not models:
        return
    yield "    expect:   # what was found; `gpumesh audit` tells when it is no longer so"
    if said:
        yield from (f"      {line}" for line in said)
    if models:
        yield f"      models: [{', '.join(models)}]"


def _observed(texts: Iterable[str]) -> Iterator[str]:
    """What a host said, as far as it is a line of text."""
    return filter(None, (clean_line(text, 300) for text in texts))


def _flow(values: SshValues) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items()) + "}"


# What YAML takes for text, also between braces; addresses of four numbers among it.
_PLAIN = re.compile(r"[A-Za-z~/](?:[A-Za-z0-9_./:~@-]*[A-Za-z0-9_./~@-])?|\d{1,3}(?:\.\d{1,3}){3}")
_WORDS = re.compile(r"(?i)(true|false|yes|no|on|off|null|y|n|~)")


def _scalar(value: str | int) -> str:
    """Text is quoted unless it is plainly a word: a host's own words are neither YAML nor variables."""
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and not _WORDS.fullmatch(value):
        return value
    return yaml_text(value)
