"""Notices that the machine slept or that its network changed, so that tunnels are checked at once.

Both are hints. A false one costs a question to each host, a missed one some seconds.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable

TICK_S = 1.0
MIN_SLEEP_S = 5.0

# linux/rtnetlink.h: RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_IFADDR
_NETLINK_GROUPS = 0x1 | 0x10 | 0x40 | 0x100


def total_sleep_s() -> float:
    """Seconds that this machine slept since it started, up to a constant. Only differences have a meaning.

    Linux's monotonic clock stands still in sleep and its boot clock does not. Elsewhere the wall clock serves as the
    boot clock: a wall clock that is set by hand looks like a sleep, which does no harm.
    """
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.time() - time.monotonic()


async def watch_sleep(
    on_wake: Callable[[], None],
    *,
    slept: Callable[[], float] = total_sleep_s,
    clock: Callable[[], float] = time.monotonic,
    tick_s: float = TICK_S,
) -> None:
    """Calls ``on_wake`` after the machine slept, or this process was stopped, for more than ``MIN_SLEEP_S``. Never
    returns."""
    slept_before, before = slept(), clock()
    while True:
        await asyncio.sleep(tick_s)
        slept_now, now = slept(), clock()
        if slept_now - slept_before > MIN_SLEEP_S or now - before > tick_s + MIN_SLEEP_S:
            on_wake()
        slept_before, before = slept_now, now


async def watch_network(on_change: Callable[[], None]) -> None:
    """Calls ``on_change`` when the kernel reports a changed link, address or route. Never returns.

    Linux (netlink), macOS and the BSDs (a routing socket) report changes. Elsewhere, and where a sandbox forbids it,
    ``on_change`` is never called.
    """
    try:
        events = _open_kernel_events()
    except OSError:
        events = None
    if events is None:
        await asyncio.get_running_loop().create_future()
        return
    with events:
        loop = asyncio.get_running_loop()
        while True:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(events, _set_result_once, readable)
            try:
                await readable
            finally:
                loop.remove_reader(events)
            _drain(events)
            on_change()


def _open_kernel_events() -> socket.socket | None:
    if sys.platform == "linux":
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            events.bind((0, _NETLINK_GROUPS))
        except OSError:
            events.close()
            raise
    elif hasattr(socket, "AF_ROUTE"):
        events = socket.socket(socket.AF_ROUTE, socket.SOCK_RAW)
    else:
        return None
    events.setblocking(False)
    return events


def _set_result_once(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _drain(events: socket.socket) -> None:
    """What changed exactly does not matter. ENOBUFS, which means that events were lost, counts as a change as well."""
    while True:
        try:
            events.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            continue
