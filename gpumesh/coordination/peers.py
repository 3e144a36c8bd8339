"""What is known of the other gateways, from what they said last. Pure: bytes and times in, counts out."""

from __future__ import annotations

import json
from collections.abc import Mapping

VERSION = 1
STALE_S = 3.0  # a gateway that says nothing for so long is gone, and what it had in flight with it
MAX_BYTES = 1 << 16
MAX_PEERS = 256
MAX_NAME = 64


def encode_loads(gateway: str, loads: Mapping[str, int], *, leaving: bool = False) -> bytes:
    told = {key: count for key, count in loads.items() if count > 0}
    return json.dumps({"v": VERSION, "gateway": gateway, "loads": told, "leaving": leaving}).encode()


def decode_loads(data: bytes) -> tuple[str, dict[str, int], bool]:
    """Who said it, the loads, and whether it leaves. Raises ValueError for what is no message of this version."""
    if len(data) > MAX_BYTES:
        raise ValueError("too long")
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise ValueError("not of this version")
    gateway, loads = document.get("gateway"), document.get("loads")
    if not isinstance(gateway, str) or not 0 < len(gateway) <= MAX_NAME or not isinstance(loads, dict):
        raise ValueError("not a message of a gateway")
    counts = {}
    for key, count in loads.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 1_000_000:
            raise ValueError("a load is not a count")
        counts[key] = count
    return gateway, counts, document.get("leaving") is True


class Peers:
    """``own`` is this gateway's name: what comes back from itself is not counted. Times are monotonic seconds."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._said: dict[str, tuple[dict[str, int], float]] = {}

    def receive(self, data: bytes, now: float) -> bool:
        """Whether anything has changed by it. What cannot be read is passed over: another version's, or not ours."""
        try:
            gateway, loads, leaving = decode_loads(data)
        except ValueError:
            return False
        if gateway == self._own:
            return False
        before = self._said.pop(gateway, None)
        if leaving:
            return before is not None
        while len(self._said) >= MAX_PEERS:
            self._said.pop(next(iter(self._said)))
        self._said[gateway] = (loads, now)
        return before is None or before[0] != loads

    def total_load(self, key: str, now: float) -> int:
        return sum(loads.get(key, 0) for loads, at in self._said.values() if now - at <= STALE_S)

    def forget_all(self) -> None:
        self._said.clear()
