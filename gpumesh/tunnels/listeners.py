"""The permanent local ports of a node: one for each target, bound once, kept over reconnects.

The supervisor owns the listening sockets and lends them to whichever worker is connected. While there is none, the
kernel completes a client's connect and lets it wait in the backlog, so that a short outage is only a delay. Waiting has
an end: after some seconds the supervisor accepts and resets, so that no client hangs on a host that stays away.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping, Sequence

from gpumesh.topology import Target

BACKLOG = 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s
_ACCEPTS_A_TURN = 64


class Listeners:
    """Binds in the constructor, on loopback, any free port; ``close`` ends it."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = tuple(targets)
        self._resetting: asyncio.AbstractEventLoop | None = None
        self.sockets: list[socket.socket] = []
        try:
            for _ in self._targets:
                self.sockets.append(_listen())
        except OSError:
            self.close()
            raise
        self.ports: tuple[int, ...] = tuple(listener.getsockname()[1] for listener in self.sockets)

    @property
    def urls(self) -> Mapping[Target, str]:
        return {
            target: f"{target.scheme}://127.0.0.1:{port}{target.path.rstrip('/')}"
            for target, port in zip(self._targets, self.ports, strict=True)
        }

    def turn_away(self) -> None:
        """From now on every client, waiting or new, is reset at once: fast failure is what a balancer wants."""
        if self._resetting is None:
            self._resetting = asyncio.get_running_loop()
            for listener in self.sockets:
                self._resetting.add_reader(listener, _reset_waiting, listener)

    def let_wait(self) -> None:
        """From now on clients wait in the backlog until a worker accepts them."""
        if self._resetting is not None:
            for listener in self.sockets:
                self._resetting.remove_reader(listener)
            self._resetting = None

    def close(self) -> None:
        self.let_wait()
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
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        client.close()
