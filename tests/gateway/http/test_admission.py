"""Who is closed for whom, without a socket."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.gateway.http.admission import Admission, Admitted, Denied, normalize_address


def full(*addresses: str | None) -> Admission[int]:
    """One connection from each address, numbered from 0, all idle, in this order."""
    admission: Admission[int] = Admission(len(addresses))
    for number, address in enumerate(addresses):
        assert admission.admit(number, address) == Admitted()
    return admission


def test_the_longest_idle_connection_is_evicted() -> None:
    admission = full(None, None, None)
    admission.mark_busy(0)
    admission.mark_busy(1)
    admission.mark_idle(1)
    assert admission.admit(10, None) == Admitted(evicted=2)
    assert admission.count == 3
    assert admission.admit(11, None) == Admitted(evicted=1)
    admission.mark_idle(0)
    assert admission.admit(12, None) == Admitted(evicted=10)


def test_a_connection_is_denied_when_all_are_busy() -> None:
    admission = full(None, None)
    admission.mark_busy(0)
    admission.mark_busy(1)
    assert admission.admit(10, None) == Denied("too many connections")
    assert admission.count == 2
    admission.forget(1)
    assert admission.admit(11, None) == Admitted()


def test_connections_without_an_accepted_request_are_evicted_first() -> None:
    admission = full(None, None, None)
    for number in (0, 1):
        admission.mark_busy(number)
        admission.register_key(number, "key")
        admission.mark_idle(number)
    assert admission.admit(10, None) == Admitted(evicted=2)
    assert admission.admit(11, None) == Admitted(evicted=10)
    assert admission.admit(12, None) == Admitted(evicted=11)


def test_one_address_cannot_hold_all_connections() -> None:
    admission: Admission[int] = Admission(8)
    admission.admit(100, "198.51.100.1")
    for number in range(6):
        assert admission.admit(number, "203.0.113.9") == Admitted()
    assert admission.admit(6, "203.0.113.9") == Admitted(evicted=0), "though there is room, and another is older"
    for number in range(1, 7):
        admission.mark_busy(number)
    assert admission.admit(7, "203.0.113.9") == Denied("too many connections from this address")
    assert admission.admit(101, "198.51.100.2") == Admitted()
    admission.forget(3)
    assert admission.admit(8, "203.0.113.9") == Admitted()


def test_local_connections_have_no_bound_per_address() -> None:
    assert full(*[None] * 8).count == 8


def test_one_key_cannot_hold_all() -> None:
    admission = full(*[None] * 8)
    for number in range(6):
        admission.mark_busy(number)
        assert admission.register_key(number, "a") == Admitted()
    admission.mark_busy(6)
    assert admission.register_key(6, "a") == Denied("too many connections with this key")
    assert admission.register_key(6, "b") == Admitted()
    admission.mark_idle(2)
    admission.mark_busy(7)
    assert admission.register_key(7, "a") == Admitted(evicted=2)
    assert admission.register_key(7, "a") == Admitted(), "it is counted once"
    assert admission.register_key(7, "b") == Admitted(), "and for its last request's key"
    admission.mark_idle(7)
    assert admission.admit(10, None) == Admitted()
    assert admission.count == 8


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, None),
        ("unix", None),
        ("127.0.0.1", None),
        ("127.8.9.10", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("what is this", "what is this"),
    ],
)
def test_normalize_address(host: str | None, address: str | None) -> None:
    assert normalize_address(host) == address


@settings(max_examples=200)
@given(st.data())
def test_the_bounds_hold_and_only_idle_connections_are_evicted(data: st.DataObject) -> None:
    admission: Admission[int] = Admission(6)
    idle: dict[int, bool] = {}
    addresses: dict[int, str | None] = {}
    for number in range(data.draw(st.integers(1, 60))):
        act = data.draw(st.sampled_from(["admit", "admit", "busy", "idle", "key", "leave"]))
        some = data.draw(st.sampled_from(sorted(idle))) if idle else None
        decision: Admitted[int] | Denied = Admitted()
        if act == "admit":
            address = data.draw(st.sampled_from([None, "x", "y"]))
            decision = admission.admit(number, address)
            if isinstance(decision, Admitted):
                idle[number], addresses[number] = True, address
        elif some is not None and act == "busy":
            admission.mark_busy(some)
            idle[some] = False
        elif some is not None and act == "idle":
            admission.mark_idle(some)
            idle[some] = True
        elif some is not None and act == "key":
            admission.mark_busy(some)
            idle[some] = False
            decision = admission.register_key(some, data.draw(st.sampled_from([None, "k", "l"])))
        elif some is not None and act == "leave":
            admission.forget(some)
            del idle[some]
        if isinstance(decision, Admitted) and decision.evicted is not None:
            assert idle.pop(decision.evicted)
        assert admission.count == len(idle) <= 6
        for address in ("x", "y"):
            assert sum(addresses[one] == address for one in idle) <= 4
    for one in list(idle):
        admission.forget(one)
    assert admission.count == 0
    assert len(admission._groups) == 2, "nothing is kept of those that left"


def test_a_decision_takes_constant_time() -> None:
    def measure_admission(count: int) -> float:
        admission = full(*["203.0.113.9", None] * (count // 2))
        best = 1.0
        for turn in range(20):
            began = time.thread_time()
            for number in range(100):
                admission.admit(count + 100 * turn + number, None)
            best = min(best, time.thread_time() - began)
        return best

    assert measure_admission(20_000) < 20 * measure_admission(200) + 0.001
