"""Probes the drafts of nodes for `init`: opens a mesh of the drafts for a moment, and keeps the report of each node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpumesh.cli.first_report import INIT_FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.init.mesh_yaml import mesh_yaml_lines
from gpumesh.cli.init.node_drafts import Draft
from gpumesh.errors import ConfigError, UsageError
from gpumesh.state import BackendPhase
from gpumesh.topology import Topology


async def probe_drafts(drafts: Sequence[Draft], source: Path) -> list[Draft]:
    """The drafts with their states, and with the port that answered as the only port. Each server is asked for its
    kind, because the drafts name no kind. ``source``: the mesh.yaml that will be written."""
    from gpumesh.mesh.mesh import Mesh

    async with Mesh(topology_of(drafts, source)) as mesh:
        state = await mesh.wait_first_report(INIT_FIRST_REPORT_TIMEOUT_S)
        probed_drafts = []
        for draft in drafts:
            node = state.node(draft.name)
            ports = draft.ports
            if node.backend.state is BackendPhase.UP:
                local_urls = mesh.tunnel(draft.name).urls  # by the target, which is the server's address on its host
                answering_port = next(
                    (target.port for target, url in local_urls.items() if url == node.backend.url), None
                )
                if answering_port is not None:
                    ports = (answering_port,)
            probed_drafts.append(replace(draft, state=node, ports=ports))
        return probed_drafts


def topology_of(drafts: Sequence[Draft], source: Path) -> Topology:
    """The drafts as the topology of the file ``source``, which is not written yet. The drafts are written to another
    file and read again, so that aliases, defaults and checks are the same as for any mesh.yaml. Raises UsageError for
    drafts that are no valid mesh.yaml."""
    from gpumesh import config
    from gpumesh.tunnels.local_system.socket_folders import private_folder

    with private_folder() as folder:
        file = folder / "mesh.yaml"
        file.write_text("\n".join(mesh_yaml_lines(drafts)) + "\n", encoding="utf-8")
        try:
            return replace(config.load(file), source=source)
        except ConfigError as error:  # nobody has seen this file, so its lines are of no use in a message
            raise UsageError("; ".join(problem.message for problem in error.problems)) from error
