"""Opens the master's forwards, one Unix socket for each target, and its reverse forwards.

Checks whether the host allows forwarding.

ssh names no target when the host refuses a channel. So the check tries all targets together, and then, only if some
were refused, each target alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpumesh.errors import ConnectTimeout, TunnelError
from gpumesh.topology import Target
from gpumesh.tunnels.openssh import mux
from gpumesh.tunnels.openssh.master import OpensshMaster
from gpumesh.tunnels.reverse_forwards import BIND_ADDRESS, ensure_bound, make_refused_error
from gpumesh.tunnels.transport import ReverseForward

REVERSE_TIMEOUT_S = 15.0  # the time for the host to answer the request to listen for us
LOG_DELAY_S = 0.05  # what ssh has logged before its answer is read within this time
MUX_TIMEOUT_S = 5.0  # the time for the master to answer at its control socket
ECHO_TIMEOUT_S = 3.0  # the time for one echo

Route = tuple[Path, Target]
"""The Unix socket at which the master listens, and the target to which it forwards."""


@dataclass(frozen=True, slots=True)
class ForwardCheck:
    """The targets to which the host forbids forwarding, and the round trip in ms if it was measured."""

    forbidden: tuple[Target, ...] = ()
    rtt_ms: float | None = None


async def open_forwards(master: OpensshMaster, routes: Sequence[Route], destination: str) -> None:
    """Makes the master listen at the socket of each route. ``destination`` is for messages. Raises ``TunnelError``."""
    try:
        async with asyncio.timeout(MUX_TIMEOUT_S):
            await mux.open_forwards(master.control, list(routes))
    except TimeoutError as error:
        raise TunnelError(f"ssh to {destination} does not answer its control socket") from error
    except mux.MuxError as error:
        raise master.output.make_error(destination, last_line=str(error)) from error


async def open_reverse_forwards(
    master: OpensshMaster, routes: Sequence[tuple[ReverseForward, Path]], destination: str
) -> None:
    """Makes the host listen for each forward; the master passes its connections on to the Unix socket of its route, at
    which we listen. Raises ``TunnelError``."""
    for forward, path in routes:
        master.output.host_debug_lines.clear()
        try:
            async with asyncio.timeout(REVERSE_TIMEOUT_S):
                await mux.open_reverse_forward(master.control, BIND_ADDRESS, forward.remote_port, path)
        except TimeoutError as error:
            raise ConnectTimeout(f"{destination} does not answer the request to listen for us") from error
        except mux.MuxError as error:
            await asyncio.sleep(LOG_DELAY_S)
            if master.exited or not await mux.is_master_alive(master.control):
                raise master.output.make_error(destination, last_line=str(error)) from error
            raise make_refused_error(destination, forward.remote_port, master.output.host_debug_lines) from error
        await asyncio.sleep(LOG_DELAY_S)
        ensure_bound(destination, forward.remote_port, master.output.host_debug_lines)


async def check_forwards(master: OpensshMaster, routes: Sequence[Route]) -> ForwardCheck:
    """Finds the targets to which the host forbids forwarding. The master must be ``ECHOING``: an echo shows that the
    host has answered all requests before it (``_count_refused``)."""
    refused_count, rtt_ms = await _count_refused(master, routes)
    if refused_count == 0:  # usual; otherwise each target is tried alone, because ssh does not name the refused ones
        return ForwardCheck((), rtt_ms)
    forbidden: list[Target] = []
    for path, target in routes:
        refused_alone, _rtt_ms = await _count_refused(master, [(path, target)])
        if refused_alone:
            forbidden.append(target)
    return ForwardCheck(tuple(forbidden), rtt_ms)


async def _count_refused(master: OpensshMaster, routes: Sequence[Route]) -> tuple[int, float | None]:
    """Opens a connection for each route. Returns how many the host has forbidden, and the round trip in ms.

    The host refuses a channel at once, so all refusals come before our second echo. (The first echo is not enough: in
    ssh its line may overtake the requests.)
    """
    old_count = master.refused_forwards
    writers: list[asyncio.StreamWriter] = []
    rtt_ms: float | None = None
    try:
        for path, _target in routes:
            _reader, writer = await asyncio.open_unix_connection(path)
            writers.append(writer)
        for _ in range(2):
            rtt_ms = await master.measure_round_trip_ms(ECHO_TIMEOUT_S)
    finally:
        for writer in writers:
            writer.close()
    return master.refused_forwards - old_count, rtt_ms
