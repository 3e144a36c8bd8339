"""Tells the service manager that has started this process that the mesh serves, lives or stops.

The protocol is systemd's sd_notify(3): datagrams to the socket that ``$NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Self

from gpumesh.config import environment

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"


class ManagerLink:
    """The socket of the service manager. ``watchdog_s``: the manager restarts a mesh that is silent for so long;
    ``None`` if it does not watch. A message that cannot be sent is lost, as if the mesh were silent."""

    def __init__(self, address: str, watchdog_s: float | None) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # "@": an abstract socket
        self.watchdog_s = watchdog_s

    def __repr__(self) -> str:
        return f"<ManagerLink {self._address!r} watchdog {self.watchdog_s}>"

    @classmethod
    def from_environment(cls) -> Self | None:
        """The link to the manager that started this process; ``None`` if no manager wants to be told."""
        address = environment.get("NOTIFY_SOCKET")
        if address is None or not hasattr(socket, "AF_UNIX"):
            return None
        interval_us = environment.get("WATCHDOG_USEC") or ""
        watched_pid = environment.get("WATCHDOG_PID")
        is_watched = interval_us.isdecimal() and watched_pid in (None, str(os.getpid()))
        return cls(address, int(interval_us) / 1e6 if is_watched else None)

    def send(self, *lines: str) -> None:
        """Sends assignments such as ``READY``."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.setblocking(False)  # a manager that does not read must not stop the mesh
            connection.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)

    def send_ready(self, status: str) -> None:
        """Tells that the mesh serves. ``status``: one line for `systemctl status`."""
        self.send(READY, f"STATUS={status.splitlines()[0] if status else ''}")

    async def keep_alive(self) -> None:
        """Tells the watchdog that the event loop runs, until it is cancelled. Returns at once without a watchdog."""
        while self.watchdog_s is not None:
            self.send(WATCHDOG)
            await asyncio.sleep(self.watchdog_s / 3)
