"""Decides which connections stay when there are more clients than connections. Pure: a connection is an opaque value.

An idle connection has no request under way: it was just opened, or waits for the next request, or has sent half of a
head. When no connection is free, the server closes the connection that has been idle the longest, and admits the new
connection. Connections without any accepted request are closed first, so that a stranger's connections go before those
of clients with a key.

No client may hold all connections. The connections from one address are at most ``MAX_SHARE`` of all connections. So
are the connections whose last request had the same key. A client at this limit gets a new connection only in place of
one of its idle connections. The addresses of this machine have no such limit: all its programs share them, and one of
the programs may be a reverse proxy in front of all clients.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Generic, TypeVar

C = TypeVar("C")

MAX_SHARE = 0.75  # the part of all connections that one client may hold
UNIX_CLIENT = "unix"  # stands for the address of a client of a Unix socket
NO_ROOM = "too many connections"
Group = tuple[str, str]
"""The kind of the group ("address", "key", …), then its name: the address or the key that its connections share."""
_ALL: Group = ("all", "")  # all connections
_NEW: Group = ("new", "")  # the connections without any accepted request


def normalize_address(host: str | None) -> str | None:
    """The address by which a client's connections are counted; ``None`` for a client on this machine. A provider's
    customer has a whole /64 network of IPv6, so such a network counts as one address."""
    if host is None or host == UNIX_CLIENT:
        return None
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # no IP address: not expected, but it can be counted by its text
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return None if address.is_loopback else str(IPv6Network((address, 64), strict=False))
        address = address.ipv4_mapped
    return None if address.is_loopback else str(address)


@dataclass(slots=True)
class _Members(Generic[C]):
    """The connections of one group. ``count`` is the number of all connections. ``idle`` holds the idle connections, in
    the order in which they became idle."""

    count: int = 0
    # Not a dict: only an OrderedDict finds its first key in constant time.
    idle: OrderedDict[C, None] = field(default_factory=OrderedDict)


@dataclass(frozen=True, slots=True)
class Admitted(Generic[C]):
    """The connection may stay. ``evicted``: another connection that must be closed to make room."""

    evicted: C | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """The connection or its request must be refused. ``reason`` tells the client why."""

    reason: str


class Admission(Generic[C]):
    """Decides whether a connection is admitted. A decision takes the same short time for any number of connections."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._max_per_client = max(int(max_connections * MAX_SHARE), 1)
        self._groups: dict[Group, _Members[C]] = {_ALL: _Members(), _NEW: _Members()}  # the members of each group
        self._groups_of: dict[C, tuple[Group, ...]] = {}  # the groups of each admitted connection

    def __repr__(self) -> str:
        idle = len(self._groups[_ALL].idle)
        return f"<Admission {self.count} of {self.max_connections} connections, {idle} idle>"

    @property
    def count(self) -> int:
        """The number of the connections that are admitted now."""
        return self._groups[_ALL].count

    def admit(self, connection: C, address: str | None) -> Admitted[C] | Denied:
        """Decides whether a new connection is admitted. ``address`` comes from ``normalize_address``. An evicted
        connection is already removed from all groups."""
        groups: tuple[Group, ...] = (_ALL, _NEW)
        decision: Admitted[C] | Denied = Admitted()
        if address is not None:
            address_group = ("address", address)
            groups = (*groups, address_group)
            decision = self._make_room(address_group, self._max_per_client, f"{NO_ROOM} from this address")
        # If a connection of the address was evicted, there is room already.
        needs_room = isinstance(decision, Admitted) and decision.evicted is None
        if needs_room and self.count >= self.max_connections:
            # Connections without any accepted request are evicted first. Limit 0: even if there are only a few of them.
            decision = self._make_room(_NEW, 0, NO_ROOM)
            if isinstance(decision, Denied):
                decision = self._make_room(_ALL, self.max_connections, NO_ROOM)
        if isinstance(decision, Admitted):
            self._groups_of[connection] = groups
            for group in groups:
                members = self._groups.setdefault(group, _Members())
                members.count += 1
                members.idle[connection] = None
        return decision

    def _make_room(self, group: Group, limit: int, reason: str) -> Admitted[C] | Denied:
        """Makes room for one more connection in the group. If the group has ``limit`` connections, the connection that
        has been idle the longest is evicted. If no connection of the group is idle, returns Denied with ``reason``."""
        members = self._groups.get(group)
        if members is None or members.count < limit:
            return Admitted()
        if not members.idle:
            return Denied(reason)
        longest_idle = next(iter(members.idle))
        self.forget(longest_idle)
        return Admitted(longest_idle)

    def register_key(self, connection: C, key: str | None) -> Admitted[C] | Denied:
        """Decides on a request with a valid key on this connection. ``key`` is ``None`` where the gateway asks for no
        key. A connection whose request is denied stays in the groups that it is in."""
        old_groups = self._groups_of.get(connection)
        if old_groups is None:  # the connection is gone
            return Admitted()
        if key is None and _NEW not in old_groups:  # a request of this connection was accepted before
            return Admitted()
        key_group = None if key is None else ("key", key)
        if key_group in old_groups:
            return Admitted()
        decision: Admitted[C] | Denied = Admitted()
        if key_group is not None:
            decision = self._make_room(key_group, self._max_per_client, f"{NO_ROOM} with this key")
            if isinstance(decision, Denied):
                return decision
        groups_to_leave = tuple(group for group in old_groups if group == _NEW or _is_key_group(group))
        new_groups = tuple(group for group in old_groups if group not in groups_to_leave)
        for group in groups_to_leave:
            self._leave(connection, group)
        if key_group is not None:
            # The connection is not added to the idle connections of the group, because it has a request under way.
            self._groups.setdefault(key_group, _Members()).count += 1
            new_groups = (*new_groups, key_group)
        self._groups_of[connection] = new_groups
        return decision

    def mark_busy(self, connection: C) -> None:
        """From now on the connection has a request under way, so it must not be evicted."""
        for group in self._groups_of.get(connection, ()):
            self._groups[group].idle.pop(connection, None)

    def mark_idle(self, connection: C) -> None:
        """All requests of the connection have been answered, so it may be evicted."""
        for group in self._groups_of.get(connection, ()):
            self._groups[group].idle[connection] = None

    def forget(self, connection: C) -> None:
        """Removes a connection that is gone or about to go."""
        for group in self._groups_of.pop(connection, ()):
            self._leave(connection, group)

    def _leave(self, connection: C, group: Group) -> None:
        """Removes the connection from the group, and the group if it is empty then."""
        members = self._groups[group]
        members.count -= 1
        members.idle.pop(connection, None)
        if not members.count and group not in (_ALL, _NEW):
            del self._groups[group]


def _is_key_group(group: Group) -> bool:
    """Whether the connections of this group share a key."""
    kind, _ = group
    return kind == "key"


def describe_peer(transport: asyncio.BaseTransport) -> tuple[str | None, str]:
    """The client's address (``None``: not known), then a text for ``__repr__``."""
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        host, port, *_ = peer
        return host, f"{host}:{port}"
    # The peer name of a client of the Unix socket is "". asyncio gives None when it could not ask the system.
    return (None, "unknown") if peer is None else (UNIX_CLIENT, UNIX_CLIENT)
