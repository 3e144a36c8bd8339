"""Keeps the last loads of each other gateway; encodes and decodes the messages with loads. Pure.

The input is bytes and times, the output counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

VERSION = 1  # of the messages
STALE_S = 3.0  # a gateway that is silent for longer has stopped: its requests in flight do not count any more
# Limits against hostile messages.
MAX_BYTES = 1 << 16
MAX_PEERS = 256
MAX_NAME_CHARS = 64
MAX_LOAD = 1_000_000


def encode_loads(gateway: str, loads: Mapping[str, int], *, leaving: bool = False) -> bytes:
    """Returns the message with the loads of ``gateway``, without those of 0: a missing key means 0. ``leaving``: the
    gateway ends, so the others forget its loads."""
    busy = {key: count for key, count in loads.items() if count > 0}
    return json.dumps({"v": VERSION, "gateway": gateway, "loads": busy, "leaving": leaving}).encode()


def decode_loads(data: bytes) -> tuple[str, dict[str, int], bool]:
    """Reads a message: returns the name of its gateway, the loads, and whether the gateway leaves. Raises ValueError
    when ``data`` is no such message."""
    if len(data) > MAX_BYTES:
        raise ValueError("too long")
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise ValueError("not of this version")
    gateway, loads = document.get("gateway"), document.get("loads")
    if not isinstance(gateway, str) or not isinstance(loads, dict):
        raise ValueError("not a message of a gateway")  # noqa: TRY004  # the docstring promises ValueError
    if not 0 < len(gateway) <= MAX_NAME_CHARS:
        raise ValueError("not a message of a gateway")
    if not all(_is_count(count) for count in loads.values()):
        raise ValueError("a load is not a count")
    return gateway, loads, document.get("leaving") is True


def _is_count(value: object) -> bool:
    """Whether the value is a whole number from 0 to ``MAX_LOAD``. A bool is none, although it is an int in Python."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LOAD


class Peers:
    """The loads of the other gateways. Times are monotonic seconds.

    ``own_name`` is this gateway's name: Redis sends its own messages back, and they are not counted.
    """

    def __init__(self, own_name: str) -> None:
        self._own_name = own_name
        # For each gateway: its loads, and the time when they came. The gateway with the earliest time comes first.
        self._loads: dict[str, tuple[dict[str, int], float]] = {}

    def __repr__(self) -> str:
        return f"<Peers {len(self._loads)} known>"

    def receive(self, data: bytes, now: float) -> bool:
        """Takes a message of any gateway. Returns whether the message has changed a load; a gateway that was not known
        counts as a change.

        A message is ignored if it cannot be read, has another version, or is from this gateway itself.
        """
        try:
            gateway, loads, leaving = decode_loads(data)
        except ValueError:
            return False
        if gateway == self._own_name:
            return False
        old_entry = self._loads.pop(gateway, None)  # so that the new entry comes last
        if leaving:
            return old_entry is not None
        while len(self._loads) >= MAX_PEERS:  # the gateway that has been silent for the longest time makes room
            earliest_gateway = next(iter(self._loads))
            del self._loads[earliest_gateway]
        self._loads[gateway] = (loads, now)
        if old_entry is None:
            return True
        old_loads, _ = old_entry
        return old_loads != loads

    def total_load(self, key: str, now: float) -> int:
        """Returns the number of requests that the other gateways have in flight on the GPUs of ``key``. A gateway that
        was silent for more than ``STALE_S`` seconds does not count."""
        return sum(loads.get(key, 0) for loads, received_at in self._loads.values() if now - received_at <= STALE_S)

    def forget_all(self) -> None:
        self._loads.clear()
