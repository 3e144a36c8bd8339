"""Requests to stop a mesh, by a signal or over the control socket.

The first signal lets requests in flight end. The second ends them with an error that says why, and the mesh closes in
order. The third ends the process.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRAIN_S = 10.0
EXIT_TIMEOUT_S = 0.5  # for a cancelled mesh to remove its files; then the process exits in any state


class Shutdown:
    """A stop can be requested more than once; the first request sets how long draining may take.

    ``forced``: draining is to end now. ``interrupted``: a second signal said so, usually a second Ctrl-C.
    """

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.interrupted = False
        self.drain_s = DRAIN_S

    def __repr__(self) -> str:
        state = "FORCED" if self.forced.is_set() else "REQUESTED" if self.requested else "RUNNING"
        return f"<Shutdown {state} drain {self.drain_s:g} s>"

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def request(self, drain_s: float = DRAIN_S) -> None:
        if not self._requested.is_set():
            self.drain_s = max(drain_s, 0.0)
            self._requested.set()

    def request_within(self, drain_s: float) -> None:
        """As ``request``. If a stop was requested before, draining is forced to end ``drain_s`` seconds from now."""
        if self._requested.is_set():
            asyncio.get_running_loop().call_later(max(drain_s, 0.0), self.force)
        else:
            self.request(drain_s)

    def force(self) -> None:
        self.request(0.0)
        self.forced.set()

    async def wait(self) -> None:
        await self._requested.wait()


def handle_signals(stop: Shutdown, numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """Installs handlers in the running loop. The third signal cancels the current task.

    SIGHUP counts only as the first signal: when a window is closed, both the terminal and the shell send it.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()

    def handle(number: signal.Signals) -> None:
        if not stop.requested:
            stop.request()
        elif number == signal.SIGHUP:
            return
        elif not stop.forced.is_set():
            stop.interrupted = True
            stop.force()
        else:
            task.cancel()
            loop.call_later(EXIT_TIMEOUT_S, os._exit, 128 + number)

    for number in numbers:
        loop.add_signal_handler(number, handle, number)
