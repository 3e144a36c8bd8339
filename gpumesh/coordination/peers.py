"""The last loads of each other gateway, and the messages that carry the loads. Pure: bytes and times in, counts out."""

from __future__ import annotations

import json
from collections.abc import Mapping

VERSION = 1
STALE_S = 3.0  # a gateway that is silent for longer has stopped, and its requests in flight do not count any more
# Limits against hostile messages.
MAX_BYTES = 1 << 16
MAX_PEERS = 256
MAX_NAME_CHARS = 64
MAX_LOAD = 1_000_000


def encode_loads(gateway: str, loads: Mapping[str, int], *, leaving: bool = False) -> bytes:
    """A message. ``leaving``: the gateway ends, so the others forget its loads."""
    busy = {key: count for key, count in loads.items() if count > 0}
    return json.dumps({"v": VERSION, "gateway": gateway, "loads": busy, "leaving": leaving}).encode()


def decode_loads(data: bytes) -> tuple[str, dict[str, int], bool]:
    """The sender's name, its loads, and whether it leaves; in this order. Raises ValueError for any other bytes."""
    if len(data) > MAX_BYTES:
        raise ValueError("too long")
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise ValueError("not of this version")
    gateway, loads = document.get("gateway"), document.get("loads")
    if not isinstance(gateway, str) or not 0 < len(gateway) <= MAX_NAME_CHARS or not isinstance(loads, dict):
        raise ValueError("not a message of a gateway")
    for count in loads.values():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_LOAD:
            raise ValueError("a load is not a count")
    return gateway, loads, document.get("leaving") is True


class Peers:
    """The loads of the other gateways. ``own_name`` is this gateway's name: Redis sends its own messages back, and they
    are not counted. Times are monotonic seconds."""

    def __init__(self, own_name: str) -> None:
        self._own_name = own_name
        # By gateway: its loads, and when they came. The gateway that was silent for the longest time comes first.
        self._loads: dict[str, tuple[dict[str, int], float]] = {}

    def __repr__(self) -> str:
        return f"<Peers {len(self._loads)} known>"

    def receive(self, data: bytes, now: float) -> bool:
        """Takes a message of any gateway. True when it has changed a load. A message that cannot be read, or that has
        another version, is ignored."""
        try:
            gateway, loads, leaving = decode_loads(data)
        except ValueError:
            return False
        if gateway == self._own_name:
            return False
        old_entry = self._loads.pop(gateway, None)
        if leaving:
            return old_entry is not None
        while len(self._loads) >= MAX_PEERS:
            self._loads.pop(next(iter(self._loads)))
        self._loads[gateway] = (loads, now)
        return old_entry is None or old_entry[0] != loads

    def total_load(self, key: str, now: float) -> int:
        """Requests that all gateways together have in flight on the GPUs of ``key``, without those of stale
        gateways."""
        return sum(loads.get(key, 0) for loads, received_at in self._loads.values() if now - received_at <= STALE_S)

    def forget_all(self) -> None:
        self._loads.clear()
