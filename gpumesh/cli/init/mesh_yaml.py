"""Renders the mesh.yaml that `init` writes, with comments, from drafts of nodes. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from gpumesh.cli.init.node_drafts import Draft, SshValues
from gpumesh.cli.views.safe_text import clean_line
from gpumesh.mesh.models.default_model import is_embedding_model
from gpumesh.state import NodeState
from gpumesh.text.quoting import yaml_text

MAX_TEXT_CHARS = 300  # of a name that a host gives


def default_model(drafts: Sequence[Draft]) -> str | None:
    """The chat model that most nodes have; ``None`` if no node has one. If several models are on equally many nodes,
    the first of them by name."""
    node_counts: Counter[str] = Counter()  # by model
    for draft in drafts:
        if draft.state is None:
            continue
        families = {info.name: info.family for info in draft.state.backend.catalog}
        models = _printable_lines(draft.state.backend.models)
        node_counts.update(model for model in models if not is_embedding_model(model, families.get(model)))
    return min(node_counts, key=lambda model: (-node_counts[model], model), default=None)


def mesh_yaml_lines(drafts: Sequence[Draft]) -> Iterator[str]:
    """Yields the lines of mesh.yaml, without line feeds. Values that are not plain are JSON strings: YAML reads such
    strings as JSON does."""
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
        yield from (f"  {line}" for line in node_lines(draft))


def node_lines(draft: Draft) -> Iterator[str]:
    """Yields the lines of one node, as an entry of a list without indentation. ``expect`` is written only if the server
    answered the probe."""
    node = draft.state
    yield f"- name: {_scalar(draft.name)}"
    if draft.note is not None:
        yield f"  # {clean_line(draft.note, 200)}"
    if node is not None and not draft.is_serving:
        yield f"  # not seen when this was written: {clean_line(node.reason or 'no answer', 200)}"
    for other in draft.others:
        yield f"  # also there: {other}"
    if draft.ssh is not None:
        yield f"  ssh: {_flow_mapping(draft.ssh)}"
    first_port, *other_ports = draft.ports
    if other_ports:
        urls = ", ".join(_scalar(f"http://127.0.0.1:{port}") for port in draft.ports)
        yield f"  backend: {{urls: [{urls}]}}   # as the host sees them; the first that answers"
    elif draft.ssh is not None:
        yield f"  backend: {{port: {first_port}}}   # as the host sees it"
    else:
        yield f"  backend: {{url: {_scalar(f'http://127.0.0.1:{first_port}')}}}"
    if node is not None and draft.is_serving:
        yield from _expect_lines(node)


def _expect_lines(node: NodeState) -> Iterator[str]:
    """Yields the lines of ``expect``, with the facts that the probe has found. `gpumesh audit` reports when they are no
    longer so."""
    facts = expected_facts(node)
    if not facts:
        return
    yield "  expect:   # what was found; `gpumesh audit` tells when it is no longer so"
    for key, value in facts.items():
        shown_value = f"[{', '.join(map(_scalar, value))}]" if isinstance(value, tuple) else _scalar(value)
        yield f"    {key}: {shown_value}"


def expected_facts(node: NodeState) -> dict[str, str | int | tuple[str, ...]]:
    """What was found on a host, by the key of ``expect``: its name, GPUs and models. The GPUs' name and size only if
    all GPUs have the same."""
    facts: dict[str, str | int | tuple[str, ...]] = {}
    hostname = clean_line(node.host.hostname or "", MAX_TEXT_CHARS)
    if hostname:
        facts["hostname"] = hostname
    gpus = node.gpus or ()
    if gpus:
        facts["gpus"] = len(gpus)
    names = {gpu.name for gpu in gpus}
    if len(names) == 1:
        facts["gpu"] = clean_line(names.pop(), MAX_TEXT_CHARS) or "unknown GPU"
    sizes = {gpu.memory_total_mib for gpu in gpus}
    if len(sizes) == 1:
        size = sizes.pop()
        if size is not None:
            facts["vram_mib"] = size
    models = tuple(_printable_lines(node.backend.models))
    if models:
        facts["models"] = models
    return facts


def _printable_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields texts from a host, each cleaned to one line. Leaves out a text of which nothing remains."""
    return filter(None, (clean_line(text, MAX_TEXT_CHARS) for text in texts))


def _flow_mapping(values: SshValues) -> str:
    """A YAML mapping on one line: ``{host: 203.0.113.7, port: 13323}``."""
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items()) + "}"


# Text that YAML also reads as text without quotes, even between braces. IPv4 addresses are such text.
_PLAIN = re.compile(r"[A-Za-z~/](?:[A-Za-z0-9_./:~@-]*[A-Za-z0-9_./~@-])?|\d{1,3}(?:\.\d{1,3}){3}")
_YAML_KEYWORDS = re.compile(r"(?i)(true|false|yes|no|on|off|null|y|n|~)")


def _scalar(value: str | int) -> str:
    """The value as YAML. A text is quoted unless it is plain: text from a host must not be read as YAML, and no
    variable in it may be expanded."""
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and not _YAML_KEYWORDS.fullmatch(value):
        return value
    return yaml_text(value)
