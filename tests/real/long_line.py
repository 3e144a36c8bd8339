"""A long and lossy line, where the kernel has no ``netem``: two tun devices, and this program between them, which holds
each packet back for half the round trip, or loses it. So TCP itself sees the delay and the loss, at both of its ends.

    python tests/real/long_line.py NAME NAME ROUND_TRIP_S LOST_OF_1000

It prints a line when both devices are there; they are gone when it ends, which is when its standard input ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_PACKET = 65535


def tun(name: str) -> int:
    """A new device, which exists for as long as the descriptor is open."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def carry(one: int, other: int, delay_s: float, lost_of_1000: int) -> None:
    goes_to = {one: other, other: one}
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        ready = select.select([one, other, 0], [], [], wait_s)[0]
        if 0 in ready:
            return
        now = time.monotonic()
        for fd in ready:
            with contextlib.suppress(BlockingIOError):
                while packet := os.read(fd, _PACKET):
                    if random.randrange(1000) >= lost_of_1000:
                        count += 1
                        heapq.heappush(on_the_way, (now + delay_s, count, goes_to[fd], packet))
        while on_the_way and on_the_way[0][0] <= now:
            _due, _count, fd, packet = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):  # the device is down, or its queue is full: lost
                os.write(fd, packet)


def main(one: str, other: str, round_trip_s: str, lost_of_1000: str) -> None:
    fds = tun(one), tun(other)
    print("ready", flush=True)
    carry(*fds, float(round_trip_s) / 2, int(lost_of_1000))


if __name__ == "__main__":
    main(*sys.argv[1:])
