"""Notices that the machine slept or that its network changed, so that tunnels are tried at once, not at the next
interval. Both are hints: a false one costs a question to the host, a missed one a few seconds.
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
    """Seconds that this machine slept since it started, up to a constant. Only differences mean something.

    Linux's monotonic clock stands still in sleep and its boot clock does not. Elsewhere the wall clock takes the boot
    clock's place: a step of it by hand looks like a sleep, which does no harm.
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
    ends."""
    slept_before, before = slept(), clock()
    while True:
        await asyncio.sleep(tick_s)
        slept_now, now = slept(), clock()
        if slept_now - slept_before > MIN_SLEEP_S or now - before > tick_s + MIN_SLEEP_S:
            on_wake()
        slept_before, before = slept_now, now


async def watch_network(on_change: Callable[[], None]) -> None:
    """Calls ``on_change`` when the kernel tells of a changed link, address or route. Never ends.

    Linux (netlink) and the BSDs, macOS (a routing socket) tell; elsewhere, or where a sandbox forbids it, nothing does.
    """
    try:
        told = _kernel_events()
    except OSError:
        told = None
    if told is None:
        await asyncio.get_running_loop().create_future()
        return
    with told:
        loop = asyncio.get_running_loop()
        while True:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(told, _set_once, readable)
            try:
                await readable
            finally:
                loop.remove_reader(told)
            _drain(told)
            on_change()


def _kernel_events() -> socket.socket | None:
    if sys.platform == "linux":
        told = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            told.bind((0, _NETLINK_GROUPS))
        except OSError:
            told.close()
            raise
    elif hasattr(socket, "AF_ROUTE"):
        told = socket.socket(socket.AF_ROUTE, socket.SOCK_RAW)
    else:
        return None
    told.setblocking(False)
    return told


def _set_once(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _drain(told: socket.socket) -> None:
    """What exactly changed does not matter. ENOBUFS (events were lost) is news as well."""
    while True:
        try:
            told.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            continue
