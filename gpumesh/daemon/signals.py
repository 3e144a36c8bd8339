"""What the signals mean that end a mesh. The first lets what is in flight end; the second tells all who still wait why
they get no more, and closes in order; the third ends the process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable

from gpumesh.daemon.mesh_process import Shutdown

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_S = 0.5  # for a cancelled mesh to leave nothing behind; then it is ended as it is


def handle_signals(stop: Shutdown, numbers: Iterable[signal.Signals] = ALL) -> None:
    """Of the running loop. The current task is what the third cancels.

    SIGHUP is only ever the first: when a window is closed, both the terminal and the shell send it.
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
            loop.call_later(END_S, os._exit, 128 + number)

    for number in numbers:
        loop.add_signal_handler(number, handle, number)
