"""Which user is at the other end of a connection: with real sockets, some of them of another user."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumesh.errors import TunnelError
from gpumesh.tunnels.local_system.peer_users import (
    MAX_REPORTED_USERS,
    REPORT_INTERVAL_S,
    OwnUserFilter,
    can_identify_peers,
    find_user_name,
    open_own_user_filter,
)
from gpumesh.tunnels.local_system.proc_net import AddressPair, SocketInfo
from gpumesh.tunnels.local_system.socket_lookup import ProcNet, SockDiag, SocketLookup
from tests.prerequisites import needs
from tests.tunnels.other_user import ANOTHER, NOBODY, connect_as

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which tells whose a connection is")


RESET = struct.pack("ii", 1, 0)


@pytest.fixture(params=[SockDiag, ProcNet])
def lookup(request: pytest.FixtureRequest) -> Iterator[SocketLookup]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture(params=[("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("::", socket.AF_INET6)])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """On IPv4, on IPv6, and on both, where an IPv4 client has an address in IPv6's form."""
    host, family = request.param
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as made:
        yield made


@pytest.fixture
def ipv4() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(20)
        yield made


def address(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    return {"::": "127.0.0.1"}.get(host, host), port


def make_filter(
    lookup: SocketLookup, reports: list[tuple[int, int]] | None = None, clock: Any = lambda: 0.0
) -> OwnUserFilter:
    kept = [] if reports is None else reports
    return OwnUserFilter(lookup, lambda port, uid: kept.append((port, uid)), clock=clock)


# -- allowed and refused----------------------------------------------------------------------------------------------


def test_our_own_connections_are_allowed(lookup: SocketLookup, listener: socket.socket) -> None:
    own_user_filter = make_filter(lookup)
    with socket.create_connection(address(listener)) as client:
        accepted, peer = listener.accept()
        with accepted:
            assert own_user_filter.find_peer_uid(accepted, peer) == os.geteuid()
            assert own_user_filter.allows(accepted, peer)
            client.shutdown(socket.SHUT_WR)  # as `nc -N` does when it has sent its request
            assert own_user_filter.allows(accepted, peer)


def test_an_ipv4_client_on_a_socket_of_ipv6_is_found(lookup: SocketLookup, ipv4: socket.socket) -> None:
    with socket.socket(socket.AF_INET6) as client:
        client.connect(("::ffff:127.0.0.1", ipv4.getsockname()[1]))
        accepted, peer = ipv4.accept()
        with accepted:
            assert make_filter(lookup).find_peer_uid(accepted, peer) == os.geteuid()


@needs("root")
@pytest.mark.parametrize("uid", [NOBODY, ANOTHER])
@pytest.mark.parametrize("way", ["ipv4", "mapped"])
async def test_another_user_is_refused(lookup: SocketLookup, ipv4: socket.socket, uid: int, way: str) -> None:
    reports: list[tuple[int, int]] = []
    own_user_filter = make_filter(lookup, reports)
    connecting = asyncio.create_task(connect_as(ipv4.getsockname()[1], uid=uid, way=way))
    accepted, peer = await asyncio.to_thread(ipv4.accept)
    with accepted:
        assert own_user_filter.find_peer_uid(accepted, peer) == uid
        assert not own_user_filter.allows(accepted, peer)
    assert await connecting == "reset"
    assert reports == [(ipv4.getsockname()[1], uid)]


@needs("root")
async def test_another_user_on_ipv6_is_refused(lookup: SocketLookup) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as ipv6:
        connecting = asyncio.create_task(connect_as(ipv6.getsockname()[1], way="ipv6"))
        accepted, peer = await asyncio.to_thread(ipv6.accept)
        with accepted:
            assert not make_filter(lookup).allows(accepted, peer)
            accepted.recv(100)
        await connecting


@needs("root")
async def test_a_socket_that_we_made_is_ours_even_in_a_process_of_another_user(
    lookup: SocketLookup, ipv4: socket.socket
) -> None:
    """Root made the connection; its process has become another user since then."""
    connecting = asyncio.create_task(connect_as(ipv4.getsockname()[1], way="before"))
    accepted, peer = await asyncio.to_thread(ipv4.accept)
    with accepted:
        assert make_filter(lookup).allows(accepted, peer)
        assert accepted.recv(100) == b"hello"
        accepted.sendall(b"served")
    assert await connecting == "answer served"


def test_a_unix_socket_is_always_allowed(lookup: SocketLookup, tmp_path: Path) -> None:
    first, second = socket.socketpair()
    with first, second:
        assert make_filter(lookup).allows(first, "")


# -- clients that have gone -----------------------------------------------------------------------------------------


def test_a_client_that_has_closed_has_no_user(lookup: SocketLookup, ipv4: socket.socket) -> None:
    """A socket that no process holds any more has uid 0 or the uid of its last user on Linux. It must be refused."""
    reports: list[tuple[int, int]] = []
    own_user_filter = make_filter(lookup, reports)
    client = socket.create_connection(ipv4.getsockname())
    accepted, peer = ipv4.accept()
    client.sendall(b"hello")
    client.close()  # FIN_WAIT2 now
    with accepted:
        assert own_user_filter.find_peer_uid(accepted, peer) is None
        assert not own_user_filter.allows(accepted, peer)
        accepted.recv(100)
    assert reports == []


def test_a_port_that_another_process_has_taken_does_not_identify_the_first_client(
    lookup: SocketLookup, ipv4: socket.socket
) -> None:
    """A client sends a request, resets, and leaves its port to a process of ours. It would be taken for that process,
    and its request can still be read."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            stranger = socket.create_connection(ipv4.getsockname())
            port = stranger.getsockname()
            stranger.sendall(b"evil")
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            stranger.close()
            accepted, peer = ipv4.accept()
            try:
                ours.bind(port)
                break
            except OSError:  # another program was quicker
                accepted.close()
        ours.connect(ipv4.getsockname())
        second, same_peer = ipv4.accept()
        with second:
            assert same_peer == peer
            assert make_filter(lookup).find_peer_uid(second, peer) == os.geteuid()
            assert make_filter(lookup).find_peer_uid(accepted, peer) is None
        assert accepted.recv(10) == b"evil"
        accepted.close()


@pytest.mark.parametrize("state", [2, 3, 6, 7, 10, 12])
def test_only_a_connection_is_a_peer(ipv4: socket.socket, state: int) -> None:
    """Where no connection has the client's ports, the lookup returns a listener of our own user at its old port."""
    with socket.create_connection(ipv4.getsockname()):
        accepted, peer = ipv4.accept()
        with accepted:
            assert make_filter(FixedLookup(SocketInfo(state, os.geteuid(), 7))).find_peer_uid(accepted, peer) is None
            assert (
                make_filter(FixedLookup(SocketInfo(1, os.geteuid(), 7))).find_peer_uid(accepted, peer) == os.geteuid()
            )
            assert make_filter(FixedLookup(SocketInfo(1, os.geteuid(), 0))).find_peer_uid(accepted, peer) is None
            assert make_filter(FixedLookup(None)).find_peer_uid(accepted, peer) is None


class FixedLookup:
    """A kernel that returns the same for every socket, or raises."""

    def __init__(self, answer: SocketInfo | OSError | None) -> None:
        self._answer = answer

    def __call__(self, pair: AddressPair) -> SocketInfo | None:
        if isinstance(self._answer, OSError):
            raise self._answer
        return self._answer

    def close(self) -> None:
        """It holds nothing open."""


def test_proc_is_read_when_netlink_fails(ipv4: socket.socket) -> None:
    with socket.create_connection(ipv4.getsockname()):
        accepted, peer = ipv4.accept()
        with accepted:
            assert (
                make_filter(FixedLookup(OSError(105, "No buffer space available"))).find_peer_uid(accepted, peer)
                == os.geteuid()
            )


# -- reports ---------------------------------------------------------------------------------------------------------


def test_a_refused_user_is_reported_once_a_minute(ipv4: socket.socket) -> None:
    now = [0.0]
    reports: list[tuple[int, int]] = []
    port = ipv4.getsockname()[1]
    with socket.create_connection(ipv4.getsockname()):
        accepted, peer = ipv4.accept()
        with accepted:
            answer = FixedLookup(SocketInfo(1, NOBODY - 1, 7))
            own_user_filter = make_filter(answer, reports, lambda: now[0])
            for _ in range(5):
                assert not own_user_filter.allows(accepted, peer)
            assert reports == [(port, NOBODY - 1)]
            now[0] = REPORT_INTERVAL_S
            assert not own_user_filter.allows(accepted, peer)
            assert len(reports) == 2
            for uid in range(100_000, 100_000 + 2 * MAX_REPORTED_USERS):  # somebody may own a range of uids
                answer._answer = SocketInfo(1, uid, 7)
                assert not own_user_filter.allows(accepted, peer)
            assert len(reports) == 2 + MAX_REPORTED_USERS - 1


def test_names_of_users() -> None:
    assert find_user_name(0) == "root"
    assert find_user_name(ANOTHER) is None


def test_a_filter_that_cannot_be_opened_raises_an_error(ipv4: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        highest = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            can_identify_peers(ipv4)
        with pytest.raises(TunnelError, match="cannot be told: Too many open files"):
            open_own_user_filter(ipv4, lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(SockDiag, "__call__", lambda _self, _pair: None)
    monkeypatch.setattr(ProcNet, "__call__", lambda _self, _pair: None)
    with pytest.raises(TunnelError, match="does not say"):
        open_own_user_filter(ipv4, lambda *_: None)


@needs("root", "netns")
async def test_a_user_that_our_namespace_does_not_know_is_not_us() -> None:
    """In a user namespace every unknown user has uid 65534. A mesh that runs there as 65534 must refuse them."""
    program = (
        "import os, socket, sys\n"
        "from gpumesh.tunnels.local_system.peer_users import open_own_user_filter, overflow_uid\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], overflow_uid(), os.geteuid(), flush=True)\n"
        "own_user_filter = open_own_user_filter(listener, lambda port, uid: None)\n"
        "accepted, peer = listener.accept()\n"
        "print('allowed' if own_user_filter.allows(accepted, peer) else 'refused', flush=True)\n"
    )
    process = await asyncio.create_subprocess_exec(
        "unshare", "--user", "--map-user=65534", sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    port, unknown, uid = (await asyncio.wait_for(process.stdout.readline(), 30)).split()
    assert (unknown, uid) == (b"65534", b"65534")
    result = await connect_as(int(port), uid=ANOTHER)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert output.split(b"\n")[-2] == b"refused"
    assert result in ("reset", "answer")
