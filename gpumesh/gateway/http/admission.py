"""Who of many clients may have a connection, when there is not room for all. Pure: connections are opaque values.

An idle connection is one with no request under way: it was just opened, or waits for the next request, or has sent half
of a head. When all are taken, the one that has been idle the longest makes room for the next; of those that never had a
request accepted first, so that a stranger's connections go before those of clients with a key.

No client may hold them all: the connections of one address, and those whose last request had the same key, are at most
``SHARE`` of all. Past that a client makes room by its own idle connections. The machine's own addresses have no such
bound: all its programs share them, and a reverse proxy that stands before everybody may be one of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Generic, TypeVar

C = TypeVar("C")

SHARE = 0.75
UNIX_CLIENT = "unix"  # the address of a client of the gateway's Unix socket
FULL = "too many connections"
_ALL, _NEW = ("all", ""), ("new", "")
Group = tuple[str, str]


def normalize_address(host: str | None) -> str | None:
    """Whose address it is, for ``Admission.admit``. One customer of a provider has a whole /64 of IPv6."""
    if host is None or host == UNIX_CLIENT:
        return None
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return None if address.is_loopback else str(IPv6Network((address, 64), strict=False))
        address = address.ipv4_mapped
    return None if address.is_loopback else str(address)


@dataclass(slots=True)
class _Members(Generic[C]):
    """``idle`` in the order in which they became so."""

    count: int = 0
    idle: OrderedDict[C, None] = field(default_factory=OrderedDict)  # a dict's first is not found in constant time


@dataclass(frozen=True, slots=True)
class Admitted(Generic[C]):
    """``evicted``: the connection that is to be closed for it."""

    evicted: C | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    reason: str


class Admission(Generic[C]):
    """Each decision takes the same short time, however many connections there are."""

    def __init__(self, most: int) -> None:
        self.max_connections = most
        self._most_each = max(int(most * SHARE), 1)
        self._groups: dict[Group, _Members[C]] = {_ALL: _Members(), _NEW: _Members()}
        self._groups_of: dict[C, tuple[Group, ...]] = {}

    @property
    def count(self) -> int:
        return self._groups[_ALL].count

    def admit(self, connection: C, address: str | None) -> Admitted[C] | Denied:
        """``address`` is ``None`` for one of this machine's own. Whoever is to be closed is forgotten already."""
        groups: tuple[Group, ...] = (_ALL, _NEW)
        room: Admitted[C] | Denied = Admitted()
        if address is not None:
            own = ("address", address)
            groups = (*groups, own)
            room = self._make_room(own, self._most_each, f"{FULL} from this address")
        if room == Admitted() and self.count >= self.max_connections:
            room = self._make_room(_NEW, 0, FULL)
            if isinstance(room, Denied):
                room = self._make_room(_ALL, self.max_connections, FULL)
        if isinstance(room, Admitted):
            self._groups_of[connection] = groups
            for group in groups:
                members = self._groups.setdefault(group, _Members())
                members.count += 1
                members.idle[connection] = None
        return room

    def _make_room(self, group: Group, most: int, reason: str) -> Admitted[C] | Denied:
        members = self._groups.get(group)
        if members is None or members.count < most:
            return Admitted()
        for longest_idle in members.idle:
            self.forget(longest_idle)
            return Admitted(longest_idle)
        return Denied(reason)

    def register_key(self, connection: C, key: str | None) -> Admitted[C] | Denied:
        """A request was accepted, with this key; ``None`` where none is asked for. Refused, it keeps its connection."""
        groups = self._groups_of.get(connection)
        if groups is None or (key is None and _NEW not in groups):
            return Admitted()
        own = None if key is None else ("key", key)
        if own in groups:
            return Admitted()
        room: Admitted[C] | Denied = Admitted()
        if own is not None:
            room = self._make_room(own, self._most_each, f"{FULL} with this key")
            if isinstance(room, Denied):
                return room
        before = tuple(group for group in groups if group == _NEW or group[0] == "key")
        kept = tuple(group for group in groups if group not in before)
        for group in before:
            self._leave(connection, group)
        if own is not None:
            self._groups.setdefault(own, _Members()).count += 1  # it has a request under way: it is not idle
            kept = (*kept, own)
        self._groups_of[connection] = kept
        return room

    def mark_busy(self, connection: C) -> None:
        for group in self._groups_of.get(connection, ()):
            self._groups[group].idle.pop(connection, None)

    def mark_idle(self, connection: C) -> None:
        for group in self._groups_of.get(connection, ()):
            self._groups[group].idle[connection] = None

    def forget(self, connection: C) -> None:
        for group in self._groups_of.pop(connection, ()):
            self._leave(connection, group)

    def _leave(self, connection: C, group: Group) -> None:
        members = self._groups[group]
        members.count -= 1
        members.idle.pop(connection, None)
        if not members.count and group not in (_ALL, _NEW):
            del self._groups[group]
