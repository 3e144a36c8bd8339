"""Lists the nodes of mesh.yaml for `gpumesh node list`: as the file has them, with the running mesh's view of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.open_session import open_session
from gpumesh.cli.views.figures import UNKNOWN, format_gib, short_gpu
from gpumesh.errors import GPUMeshError
from gpumesh.state import Health, NodeState
from gpumesh.text.addresses import format_address
from gpumesh.topology import NodeSpec, Topology

NOT_LOADED = "not in the running mesh"
DISABLED = "not enabled"


async def list_nodes(options: GlobalOptions, topology: Topology) -> list[dict[str, Any]]:
    """The nodes as JSON objects. ``health`` is ``None`` if no mesh runs, or if it does not have the node."""
    running_nodes: dict[str, NodeState] | None = None
    try:
        async with open_session(options, embed=False) as session:
            running_nodes = {node.name: node for node in (await session.status()).nodes}
    except GPUMeshError:  # no mesh runs, or it does not answer
        pass
    return [_describe_node(spec, running_nodes) for spec in topology.nodes]


def _describe_node(spec: NodeSpec, running_nodes: dict[str, NodeState] | None) -> dict[str, Any]:
    """A row of the table. ``running_nodes``: the nodes of the running mesh by name; ``None``: no mesh runs."""
    state = None if running_nodes is None else running_nodes.get(spec.name)
    reason = None if state is None else state.reason
    if not spec.enabled:
        reason = DISABLED
    elif running_nodes is not None and state is None:
        reason = NOT_LOADED
    return {
        "name": spec.name,
        "enabled": spec.enabled,
        "address": _format_login(spec),
        "servers": [target.url for target in spec.backend.targets],
        "gpus": spec.expect.gpus,
        "gpu": spec.expect.gpu,
        "vram_mib": spec.expect.vram_mib,
        "models": list(spec.expect.models),
        "health": None if state is None else state.health.value,
        "reason": reason,
    }


def _format_login(spec: NodeSpec) -> str | None:
    """The alias, or user, host and port of the SSH server; ``None`` for a direct node."""
    ssh = spec.ssh
    if ssh is None:
        return None
    if ssh.alias is not None:
        return ssh.alias
    if ssh.address_from is not None:
        return "address_from"
    address = ssh.host if ssh.port == 22 else format_address(ssh.host, ssh.port)
    return f"{ssh.user}@{address}"


def print_nodes(nodes: Sequence[dict[str, Any]], *, wide: bool) -> None:
    """Prints the table; with ``wide`` all of its columns, however narrow the terminal is."""
    from gpumesh.cli.views import tables
    from gpumesh.cli.views.status.health_marks import MARKS, STYLES

    rows = []
    for node in nodes:
        health = None if node["health"] is None else Health(node["health"])
        shown_health = tables.Cell(UNKNOWN, "dim")
        if health is not None:
            shown_health = tables.Cell(f"{MARKS[health]} {health.value}", STYLES[health])
        servers = node["servers"]
        server = servers[0] + (f" +{len(servers) - 1}" if len(servers) > 1 else "")
        rows.append(
            (
                node["name"],
                shown_health,
                node["address"] or "direct",
                server,
                _format_gpus(node),
                node["reason"] or "",
            )
        )
    columns = (  # the second argument is the rank: columns with a low rank get their place first
        tables.Column("NODE"),
        tables.Column("HEALTH", 2),
        tables.Column("ADDRESS", 1, min_width=16),
        tables.Column("SERVER", 3, min_width=16),
        tables.Column("EXPECTED", 4),
        tables.Column("REASON", 5, min_width=16),
    )
    tables.print_fitted_table(columns, rows, wide=wide)


def _format_gpus(node: dict[str, Any]) -> str:
    """The GPUs that mesh.yaml expects: ``2 x RTX 4090, 24.0 GiB``."""
    if node["gpus"] is None:
        return ""
    name = short_gpu(node["gpu"]) if node["gpu"] else "GPU"
    text = name if node["gpus"] == 1 else f"{node['gpus']} x {name}"
    return text if node["vram_mib"] is None else f"{text}, {format_gib(node['vram_mib'])} GiB"
