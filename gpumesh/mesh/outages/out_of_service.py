"""Takes a node out of service while somebody holds it, to measure what an outage does, and puts it back.

An outage lasts as long as its context. Who asked for it and then ended, in whatever way, holds it no more: the control
socket ends the context together with the connection of the process that asked (``daemon/control_socket``).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from gpumesh.errors import ExecError, GPUMeshError, UsageError
from gpumesh.mesh.mesh import Mesh
from gpumesh.mesh.outages.outage import Outage, OutageKind
from gpumesh.text.printable import printable
from gpumesh.tunnels.direct.this_machine import run_command

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 60.0  # for the command that stops or starts a server
MAX_OUTPUT_BYTES = 1 << 16
MAX_SHOWN_OUTPUT = 200  # characters of a failed command's output


@asynccontextmanager
async def take_out_of_service(mesh: Mesh, node: str, outage: Outage) -> AsyncGenerator[None]:
    """Takes the node out of service during the block.

    Raises UsageError for an unknown node and for an outage that this node cannot have, TunnelDown when its tunnel is
    not up, and ExecError when a command fails.
    """
    extra = {"event": "outage", "node": node}
    match outage.kind:
        case OutageKind.DRAIN:
            context = _drained(mesh, node)
        case OutageKind.TUNNEL:
            context = _tunnel_closed(mesh, node)
        case OutageKind.SERVER:
            context = _server_stopped(mesh, node, outage)
    async with context:
        log.warning("%s is out of service by request (%s), until the asker ends", node, outage.kind, extra=extra)
        try:
            yield
        finally:
            log.warning("%s is put back into service", node, extra=extra)


@asynccontextmanager
async def _drained(mesh: Mesh, name: str) -> AsyncGenerator[None]:
    """Sends no new requests to the node during the block."""
    node, hold = mesh.fleet.find_node(name), object()
    node.role.drain_holds.add(hold)
    node.announce_change()
    try:
        yield
    finally:
        for current in mesh.fleet:
            if current.name == name:  # it may be a successor of ``node``, after a reload; or the node has left
                current.role.drain_holds.discard(hold)
                current.announce_change()


@asynccontextmanager
async def _tunnel_closed(mesh: Mesh, name: str) -> AsyncGenerator[None]:
    """Cuts the node's tunnel, and keeps it closed during the block."""
    with mesh.tunnel(name).held_closed():
        yield


@asynccontextmanager
async def _server_stopped(mesh: Mesh, name: str, outage: Outage) -> AsyncGenerator[None]:
    """Runs the stop command on the node's host, and after the block the start command, also if the first failed: it
    may have stopped the server nevertheless."""
    if outage.stop_command is None or outage.start_command is None:
        raise UsageError("a server is stopped with two commands: one that stops it, one that starts it")
    is_here = not mesh.fleet.find_node(name).uses_ssh
    if is_here:  # while its server is stopped, nobody could tell that it runs on this machine
        await mesh.exec(name, ["true"], timeout_s=COMMAND_TIMEOUT_S)
    try:
        await _run_command(mesh, name, outage.stop_command, is_here=is_here)
        yield
    finally:
        try:
            await _run_command(mesh, name, outage.start_command, is_here=is_here)
        except GPUMeshError as error:
            log.error("the server of %s was not started again: %s", name, error, extra={"event": "outage"})  # noqa: TRY400
            raise


async def _run_command(mesh: Mesh, node: str, command: str, *, is_here: bool) -> None:
    """Runs the command in the shell of the node's host, which is this machine if ``is_here``. Raises ExecError if its
    exit status is not 0."""
    argv = ["sh", "-c", command]
    try:
        if is_here:
            result = await run_command(argv, timeout_s=COMMAND_TIMEOUT_S, limit_bytes=MAX_OUTPUT_BYTES)
        else:
            result = await mesh.exec(node, argv, timeout_s=COMMAND_TIMEOUT_S)
    except TimeoutError as error:
        message = f"no end of the command {command!r} within {COMMAND_TIMEOUT_S:g} s on {node}"
        raise ExecError(message, node=node) from error
    except (OSError, ValueError) as error:
        raise ExecError(f"the command {command!r} cannot be run on {node}: {error}", node=node) from error
    if result.exit_status != 0:
        output = printable((result.stderr or result.stdout).decode("utf-8", "replace").strip(), MAX_SHOWN_OUTPUT)
        message = f"the command {command!r} ended with exit status {result.exit_status} on {node}"
        raise ExecError(f"{message}: {output}" if output else message, node=node)
