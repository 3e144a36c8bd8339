"""The text of the mesh.yaml that `init` writes, with comments, from drafts of nodes. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from gpumesh.cli.init.node_drafts import Draft, SshValues
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.quoting import yaml_text
from gpumesh.state import NodeState


def default_model(drafts: Sequence[Draft]) -> str | None:
    """The chat model that most nodes have. If several models are on equally many nodes, the first of them by name."""
    names: Counter[str] = Counter()
    for draft in drafts:
        if draft.state is None:
            continue
        families = {info.name: info.family for info in draft.state.backend.catalog}
        models = _printable_lines(draft.state.backend.models)
        names.update(name for name in models if not is_embedding_model(name, families.get(name)))
    return min(names, key=lambda name: (-names[name], name), default=None)


def mesh_yaml_lines(drafts: Sequence[Draft]) -> Iterator[str]:
    """The lines of mesh.yaml. Values are JSON strings: YAML reads them the same."""
    yield "# Your GPUs, and how to reach them. `gpumesh config check` looks it over; all keys: `gpumesh config schema`."
    yield "version: 1"
    yield "name: home"
    yield ""
    yield "gateway:"
    yield "  listen: 127.0.0.1:11430   # the one address for all clients"
    model = default_model(drafts)
    if model is not None:
        yield f"  default_model: {_scalar(model)}   # for prompts that name none"
    yield ""
    yield "nodes:"
    for draft in drafts:
        yield from _node_lines(draft)


def _node_lines(draft: Draft) -> Iterator[str]:
    node = draft.state
    yield f"  - name: {_scalar(draft.name)}"
    if draft.note is not None:
        yield f"    # {clean_line(draft.note, 200)}"
    if node is not None and not draft.is_serving:
        yield f"    # not seen when this was written: {clean_line(node.reason or 'no answer', 200)}"
    if draft.ssh is not None:
        yield f"    ssh: {_flow_mapping(draft.ssh)}"
    if len(draft.ports) > 1:
        joined = ", ".join(_scalar(f"http://127.0.0.1:{port}") for port in draft.ports)
        yield f"    backend: {{urls: [{joined}]}}   # as the host sees them; the first that answers"
    elif draft.ssh is not None:
        yield f"    backend: {{port: {draft.ports[0]}}}   # as the host sees it"
    else:
        yield f"    backend: {{url: {_scalar(f'http://127.0.0.1:{draft.ports[0]}')}}}"
    if node is not None and draft.is_serving:
        yield from _expect_lines(node)


def _expect_lines(node: NodeState) -> Iterator[str]:
    """From now on the file expects what the probe has found; `gpumesh audit` reports differences."""
    expect: dict[str, str | int] = {}
    for hostname in _printable_lines([node.host.hostname or ""]):
        expect["hostname"] = hostname
    if node.gpus:
        expect["gpus"] = len(node.gpus)
        if len({gpu.name for gpu in node.gpus}) == 1:
            expect["gpu"] = next(_printable_lines([node.gpus[0].name]), "unknown GPU")
        sizes = {gpu.memory_total_mib for gpu in node.gpus}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            expect["vram_mib"] = size
    lines = [f"{key}: {_scalar(value)}" for key, value in expect.items()]
    models = [_scalar(name) for name in _printable_lines(node.backend.models)]
    if not lines and not models:
        return
    yield "    expect:   # what was found; `gpumesh audit` tells when it is no longer so"
    yield from (f"      {line}" for line in lines)
    if models:
        yield f"      models: [{', '.join(models)}]"


def _printable_lines(texts: Iterable[str]) -> Iterator[str]:
    """Texts from a host, cleaned; empty ones are left out."""
    return filter(None, (clean_line(text, 300) for text in texts))


def _flow_mapping(values: SshValues) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items()) + "}"


# Text that YAML also reads as text without quotes, even between braces. IPv4 addresses are such text.
_PLAIN = re.compile(r"[A-Za-z~/](?:[A-Za-z0-9_./:~@-]*[A-Za-z0-9_./~@-])?|\d{1,3}(?:\.\d{1,3}){3}")
_YAML_KEYWORDS = re.compile(r"(?i)(true|false|yes|no|on|off|null|y|n|~)")


def _scalar(value: str | int) -> str:
    """Text is quoted unless it is plain: text from a host must not be read as YAML, and no variable in it is
    expanded."""
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and not _YAML_KEYWORDS.fullmatch(value):
        return value
    return yaml_text(value)
