"""SIGHUP: a reload for a mesh without a terminal; the end of a mesh whose terminal is closed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable


def hangup_means_reload() -> bool:
    """Whether SIGHUP cannot come from a terminal: this process has none, as under systemd, or was told to ignore that
    signal, as by nohup."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return True
    return False


def reload_at_hangup(request_reload: Callable[[], None]) -> None:
    """Makes SIGHUP call ``request_reload`` on the event loop that runs now."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, request_reload)
