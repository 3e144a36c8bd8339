"""Requests to stop a mesh, by a signal (Ctrl-C, SIGTERM) or over the control socket: how long the mesh may drain.

The first signal lets requests in flight end. The second signal ends these requests with an error that says why, and the
mesh closes in order. The third signal ends the process.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable

STOP_SIGNALS_WITHOUT_HANGUP = (signal.SIGINT, signal.SIGTERM)
STOP_SIGNALS = (*STOP_SIGNALS_WITHOUT_HANGUP, signal.SIGHUP)
DRAIN_S = 10.0  # for the requests in flight to end after the first signal
EXIT_TIMEOUT_S = 0.5  # for a cancelled mesh to remove its files; then the process exits in any state


class Shutdown:
    """The state of a mesh's stop. A stop can be requested more than once; the first request sets ``drain_s``, the time
    that draining may take.

    ``forced`` is set when draining is to end now. ``interrupted``: a second signal forced it, usually a second Ctrl-C.
    """

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.interrupted = False
        self.drain_s = DRAIN_S

    def __repr__(self) -> str:
        state = "RUNNING"
        if self.forced.is_set():
            state = "FORCED"
        elif self.requested:
            state = "REQUESTED"
        return f"<Shutdown {state} drain {self.drain_s:g} s>"

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def request(self, drain_s: float = DRAIN_S) -> None:
        """Requests a stop after ``drain_s`` seconds of draining at most. A later request changes nothing."""
        if not self._requested.is_set():
            self.drain_s = max(drain_s, 0.0)
            self._requested.set()

    def request_within(self, drain_s: float) -> None:
        """As ``request``. But if a stop was requested before, ends its draining ``drain_s`` seconds from now, unless it
        ends earlier."""
        if self._requested.is_set():
            asyncio.get_running_loop().call_later(max(drain_s, 0.0), self.force)
        else:
            self.request(drain_s)

    def force(self) -> None:
        """Requests a stop without draining, or ends the draining that has begun."""
        self.request(0.0)
        self.forced.set()

    async def wait(self) -> None:
        """Returns when a stop is requested."""
        await self._requested.wait()


def handle_signals(stop: Shutdown, numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """Makes signals request the stop: the first drains, the second forces, the third cancels the current task and ends
    the process ``EXIT_TIMEOUT_S`` later.

    SIGHUP counts only as the first signal: when a window is closed, both the terminal and the shell send SIGHUP, and
    the second one must not cut the requests in flight.
    """
    task = asyncio.current_task()
    assert task is not None, "this was called outside of a task"
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
            loop.call_later(EXIT_TIMEOUT_S, os._exit, 128 + number)  # the exit status of a process that a signal ends

    for number in numbers:
        loop.add_signal_handler(number, handle, number)
