"""Probes the drafts of nodes for `init` and `node add`: asks each host for its ports, then its servers and GPUs.

The second step opens a mesh of the drafts for a moment, so that a node is seen here as it will be seen later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpumesh.cli.first_report import INIT_FIRST_REPORT_TIMEOUT_S
from gpumesh.cli.init.host_ports import HostAnswer, ask_hosts
from gpumesh.cli.init.mesh_yaml import mesh_yaml_lines
from gpumesh.cli.init.node_drafts import Draft, FoundServer
from gpumesh.errors import ConfigError, ProbeError, UsageError
from gpumesh.state import BackendPhase, BackendState, Health, NodeState
from gpumesh.topology import BackendKind, Target, Topology

if TYPE_CHECKING:
    from gpumesh.mesh.mesh import Mesh

OTHER_SERVERS_TIMEOUT_S = 3.0  # for the servers of a host besides the one that is used

ReadTopology = Callable[[Sequence[Draft]], Topology]
"""Returns a topology whose nodes are these drafts."""


async def probe_drafts(drafts: Sequence[Draft], read_topology: ReadTopology) -> list[Draft]:
    """The drafts with their states, and with the port that answered as the only port. Each server is asked for its
    kind, because the drafts name no kind. Leaves out drafts of this machine at whose port nothing listens."""
    from gpumesh.mesh.mesh import Mesh

    drafts = _listening_here(drafts)
    answers = await ask_hosts(read_topology(drafts)) if drafts else {}
    probed = {draft.name: draft for draft in (_with_ports(draft, answers) for draft in drafts)}
    reached = [draft for draft in probed.values() if draft.state is None]
    if reached:
        async with Mesh(read_topology(reached)) as mesh:
            state = await mesh.wait_first_report(INIT_FIRST_REPORT_TIMEOUT_S)
            results = [_with_state(draft, state.node(draft.name), mesh) for draft in reached]
            for draft, others in zip(results, await _find_other_servers(results, reached, mesh), strict=True):
                probed[draft.name] = replace(draft, others=others)
    return [
        # If no server answered, all usual ports are written down: the server may be started later.
        probed_draft if probed_draft.is_serving else replace(probed_draft, ports=draft.ports)
        for draft, probed_draft in ((draft, probed[draft.name]) for draft in drafts)
    ]


def _listening_here(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts without those of this machine at whose port nothing listens."""
    from gpumesh.tunnels.local_system.listening_sockets import list_listening_sockets

    ports = {listener.port for listener in list_listening_sockets()}
    # A system that does not tell lists none; then each port is tried.
    return [draft for draft in drafts if draft.ssh is not None or not ports or ports.intersection(draft.ports)]


def _with_ports(draft: Draft, answers: Mapping[str, HostAnswer]) -> Draft:
    """The draft with the ports that its host may have a server on; with a state if its host was not reached."""
    from gpumesh.probes.listening_ports import choose_ports

    answer = answers.get(draft.name)
    if answer is None:
        return draft
    if not answer.is_reached:
        reason = answer.tunnel.last_error or "the host does not answer"
        return replace(draft, state=NodeState(draft.name, Health.DOWN, reason, answer.tunnel, BackendState("auto")))
    if answer.ports is None:
        return draft
    return replace(draft, ports=choose_ports(answer.ports, draft.ports) or draft.ports)


def _with_state(draft: Draft, node: NodeState, mesh: Mesh) -> Draft:
    """The draft with the state of its node, and with the port of the server that answered."""
    answering_port = None
    if node.backend.state is BackendPhase.UP:
        local_urls = mesh.tunnel(draft.name).urls  # by the target, which is the server's address on its host
        answering_port = next((target.port for target, url in local_urls.items() if url == node.backend.url), None)
    return replace(draft, state=node, ports=draft.ports if answering_port is None else (answering_port,))


async def _find_other_servers(
    drafts: Sequence[Draft], asked: Sequence[Draft], mesh: Mesh
) -> list[tuple[FoundServer, ...]]:
    """The servers on the host of each draft besides the one that is used. ``asked`` are the drafts with all ports."""
    from gpumesh.probes.http_client import make_http_client
    from gpumesh.probes.server_inventory import ask_server

    async with make_http_client() as client:

        async def ask(target: Target, url: str) -> FoundServer | None:
            """Asks whether an inference server answers at this end of the tunnel."""
            try:
                answer = await ask_server(
                    client, BackendKind.AUTO, url, target, api_key=None, timeout_s=OTHER_SERVERS_TIMEOUT_S
                )
            except ProbeError:  # no inference server
                return None
            return FoundServer(target.port, answer.kind.value)

        async def ask_all(draft: Draft, asked_draft: Draft) -> tuple[FoundServer, ...]:
            """Finds servers on the further ports of the host: those of ``asked_draft`` that the draft does not use."""
            if not draft.is_serving or len(asked_draft.ports) == 1:
                return ()
            urls = mesh.tunnel(draft.name).urls
            servers = await asyncio.gather(
                *(ask(target, url) for target, url in urls.items() if target.port not in draft.ports)
            )
            return tuple(server for server in servers if server is not None)

        return await asyncio.gather(*(ask_all(*pair) for pair in zip(drafts, asked, strict=True)))


def new_file_topology(source: Path) -> ReadTopology:
    """The topology of a new file ``source``, which is not written yet. The drafts are written to another file and read
    again, so that aliases, defaults and checks are the same as for any mesh.yaml. The function raises UsageError for
    drafts that are no valid mesh.yaml."""

    def read_topology(drafts: Sequence[Draft]) -> Topology:
        """Reads the drafts as a mesh.yaml would be read. Raises UsageError with all problems."""
        from gpumesh import config
        from gpumesh.tunnels.local_system.socket_folders import private_folder

        with private_folder() as folder:
            file = folder / "mesh.yaml"
            file.write_text("\n".join(mesh_yaml_lines(drafts)) + "\n", encoding="utf-8")
            try:
                return replace(config.load(file), source=source)
            except ConfigError as error:  # nobody has seen this file, so its lines are of no use in a message
                raise UsageError("; ".join(problem.message for problem in error.problems)) from error

    return read_topology
