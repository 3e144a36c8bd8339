"""The permanent local ends of a node's tunnel, ports or Unix sockets: one for each target, bound once, kept over
reconnects.

The supervisor owns the listening sockets and lends them to whichever worker is connected. While there is none, the
kernel completes a client's connect and lets it wait in the backlog, so that a short outage is only a delay. Waiting has
an end: after some seconds the supervisor accepts and resets, so that no client hangs on a host that stays away.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpumesh.errors import GPUMeshError
from gpumesh.state import LocalAccess
from gpumesh.topology import DEFAULT_TUNNELS, Target, TunnelListen, TunnelsSpec
from gpumesh.tunnels.local_system.peer_users import can_identify_peers
from gpumesh.tunnels.local_system.unix_sockets import UnixListener, open_tunnel_listener, unix_url

BACKLOG = 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s
_ACCEPTS_A_TURN = 64


class Listeners:
    """Binds in the constructor, on loopback, any free port, or a Unix socket named after ``mesh`` and ``node``;
    ``close`` ends it. Raises OSError, and GPUMeshError where no Unix socket can be had."""

    def __init__(
        self, targets: Sequence[Target], spec: TunnelsSpec = DEFAULT_TUNNELS, *, mesh_name: str = "mesh", node: str = ""
    ) -> None:
        self._targets = tuple(targets)
        self._resetting: asyncio.AbstractEventLoop | None = None
        self._unix: list[UnixListener] = []
        self.sockets: list[socket.socket] = []
        try:
            for number in range(len(self._targets)):
                if spec.listen is TunnelListen.UNIX:
                    self._unix.append(open_tunnel_listener(mesh_name, node, number, BACKLOG))
                    self.sockets.append(self._unix[-1].sock)
                else:
                    self.sockets.append(_listen())
        except (OSError, GPUMeshError):
            self.close()
            raise
        self.ports: tuple[int, ...] = () if self._unix else tuple(one.getsockname()[1] for one in self.sockets)
        self.paths: tuple[Path, ...] = tuple(one.path for one in self._unix)
        self.access = self._access(spec)

    def _access(self, spec: TunnelsSpec) -> LocalAccess | None:
        """Who can connect."""
        if not self.sockets:
            return None
        if self._unix:
            return LocalAccess.OWN_USER
        if spec.share:
            return LocalAccess.ANY_USER
        return LocalAccess.OWN_USER if can_identify_peers(self.sockets[0]) else LocalAccess.UNCHECKED

    @property
    def urls(self) -> Mapping[Target, str]:
        return dict(zip(self._targets, map(self._url, range(len(self._targets)), self._targets), strict=True))

    def _url(self, number: int, target: Target) -> str:
        prefix = target.path.rstrip("/")
        if self._unix:
            return unix_url(self.paths[number], scheme=target.scheme, prefix=prefix)
        return f"{target.scheme}://127.0.0.1:{self.ports[number]}{prefix}"

    def reset_clients(self) -> None:
        """From now on every client, waiting or new, is reset at once: fast failure is what a balancer wants."""
        if self._resetting is None:
            self._resetting = asyncio.get_running_loop()
            for listener in self.sockets:
                self._resetting.add_reader(listener, _reset_waiting, listener)

    def hold_clients(self) -> None:
        """From now on clients wait in the backlog until a worker accepts them."""
        if self._resetting is not None:
            for listener in self.sockets:
                self._resetting.remove_reader(listener)
            self._resetting = None

    def close(self) -> None:
        self.hold_clients()
        for unix in self._unix:
            unix.close()
        for listener in self.sockets:
            listener.close()


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _reset_waiting(listener: socket.socket) -> None:
    for _ in range(_ACCEPTS_A_TURN):
        try:
            client, _address = listener.accept()
        except OSError:  # none left (BlockingIOError), or out of file descriptors: the next turn tries again
            return
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        client.close()
