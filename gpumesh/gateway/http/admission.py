"""Which connections stay when there are more clients than connections. Pure: a connection is an opaque value.

An idle connection has no request under way: it was just opened, or waits for the next request, or has sent half of a
head. When all connections are taken, the one that has been idle the longest is closed for the next. Connections that
never had a request accepted are closed first, so that a stranger's connections go before those of clients with a key.

No client may hold all connections: the connections of one address, and those whose last request had the same key, are
at most ``SHARE`` of all. Past that, only the client's own idle connections are closed for its next. The machine's own
addresses have no such bound: all its programs share them, and a reverse proxy in front of all clients may be one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Generic, TypeVar

C = TypeVar("C")

SHARE = 0.75
UNIX_CLIENT = "unix"  # the address of a client of a Unix socket
FULL = "too many connections"
Group = tuple[str, str]
"""What kind of group, and its name: the address or the key that its connections share."""
_ALL: Group = ("all", "")
_NEW: Group = ("new", "")  # no request of theirs has been accepted


def normalize_address(host: str | None) -> str | None:
    """The name of an address's client, for ``Admission.admit``; ``None`` for this machine's own. A provider's customer
    has a whole /64 of IPv6, so that counts as one address."""
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
    """The connections of one group; ``idle`` in the order in which they became idle."""

    count: int = 0
    idle: OrderedDict[C, None] = field(default_factory=OrderedDict)  # a dict does not find its first in constant time


@dataclass(frozen=True, slots=True)
class Admitted(Generic[C]):
    """``evicted``: the connection that must be closed for it."""

    evicted: C | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """There is no room, for this reason."""

    reason: str


class Admission(Generic[C]):
    """Decides who is admitted. Each decision takes the same short time, however many connections there are."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._max_per_client = max(int(max_connections * SHARE), 1)
        self._groups: dict[Group, _Members[C]] = {_ALL: _Members(), _NEW: _Members()}
        self._groups_of: dict[C, tuple[Group, ...]] = {}

    def __repr__(self) -> str:
        idle = len(self._groups[_ALL].idle)
        return f"<Admission {self.count} of {self.max_connections} connections, {idle} idle>"

    @property
    def count(self) -> int:
        return self._groups[_ALL].count

    def admit(self, connection: C, address: str | None) -> Admitted[C] | Denied:
        """``address``: as ``normalize_address`` names it. The evicted connection is forgotten already."""
        groups: tuple[Group, ...] = (_ALL, _NEW)
        room: Admitted[C] | Denied = Admitted()
        if address is not None:
            own = ("address", address)
            groups = (*groups, own)
            room = self._make_room(own, self._max_per_client, f"{FULL} from this address")
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

    def _make_room(self, group: Group, limit: int, reason: str) -> Admitted[C] | Denied:
        """Room for one more connection in the group."""
        members = self._groups.get(group)
        if members is None or members.count < limit:
            return Admitted()
        for longest_idle in members.idle:
            self.forget(longest_idle)
            return Admitted(longest_idle)
        return Denied(reason)

    def register_key(self, connection: C, key: str | None) -> Admitted[C] | Denied:
        """A request with this key is accepted; ``None`` where no key is asked for. Where it is denied, the connection
        stays."""
        groups = self._groups_of.get(connection)
        if groups is None or (key is None and _NEW not in groups):
            return Admitted()
        own = None if key is None else ("key", key)
        if own in groups:
            return Admitted()
        room: Admitted[C] | Denied = Admitted()
        if own is not None:
            room = self._make_room(own, self._max_per_client, f"{FULL} with this key")
            if isinstance(room, Denied):
                return room
        left = tuple(group for group in groups if group == _NEW or group[0] == "key")
        kept = tuple(group for group in groups if group not in left)
        for group in left:
            self._leave(connection, group)
        if own is not None:
            self._groups.setdefault(own, _Members()).count += 1  # not among the idle: it has a request under way
            kept = (*kept, own)
        self._groups_of[connection] = kept
        return room

    def mark_busy(self, connection: C) -> None:
        """The connection has a request under way."""
        for group in self._groups_of.get(connection, ()):
            self._groups[group].idle.pop(connection, None)

    def mark_idle(self, connection: C) -> None:
        """All requests of the connection have been answered."""
        for group in self._groups_of.get(connection, ()):
            self._groups[group].idle[connection] = None

    def forget(self, connection: C) -> None:
        """The connection is gone, or about to go."""
        for group in self._groups_of.pop(connection, ()):
            self._leave(connection, group)

    def _leave(self, connection: C, group: Group) -> None:
        members = self._groups[group]
        members.count -= 1
        members.idle.pop(connection, None)
        if not members.count and group not in (_ALL, _NEW):
            del self._groups[group]
