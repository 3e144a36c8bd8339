import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.coordination.peers import MAX_PEERS, STALE_S, Peers, decode_loads, encode_loads
from tests.absurd_answers import ABSURD, Raw, json_bytes


def test_loads_of_others_are_added_up_and_ones_own_are_not() -> None:
    peers = Peers("me")
    assert peers.receive(encode_loads("a", {"GPU-1": 2, "GPU-2": 1}), 0.0)
    assert peers.receive(encode_loads("b", {"GPU-1": 3}), 0.0)
    assert not peers.receive(encode_loads("me", {"GPU-1": 100}), 0.0)
    assert (peers.total_load("GPU-1", 0.0), peers.total_load("GPU-2", 0.0), peers.total_load("GPU-3", 0.0)) == (5, 1, 0)


def test_only_new_loads_are_a_change() -> None:
    peers = Peers("me")
    assert peers.receive(encode_loads("a", {"GPU-1": 2}), 0.0)
    assert not peers.receive(encode_loads("a", {"GPU-1": 2}), 1.0)
    assert peers.receive(encode_loads("a", {}), 2.0)


def test_a_gateway_that_is_silent_or_leaves_is_forgotten() -> None:
    peers = Peers("me")
    peers.receive(encode_loads("a", {"GPU-1": 2}), 0.0)
    assert peers.total_load("GPU-1", STALE_S) == 2
    assert peers.total_load("GPU-1", STALE_S + 0.1) == 0
    peers.receive(encode_loads("a", {"GPU-1": 2}), 5.0)
    assert peers.receive(encode_loads("a", {}, leaving=True), 5.0)
    assert peers.total_load("GPU-1", 5.0) == 0
    assert not peers.receive(encode_loads("b", {}, leaving=True), 5.0)


def test_no_more_peers_are_kept_than_the_bound() -> None:
    peers = Peers("me")
    for number in range(MAX_PEERS * 2):
        peers.receive(encode_loads(f"g{number}", {"GPU-1": 1}), 0.0)
    assert peers.total_load("GPU-1", 0.0) == MAX_PEERS


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 10_000,
        json.dumps({"v": 2, "gateway": "a", "loads": {}}).encode(),
        json.dumps({"v": 1, "gateway": "", "loads": {}}).encode(),
        json.dumps({"v": 1, "gateway": "a", "loads": {"x": -1}}).encode(),
        json.dumps({"v": 1, "gateway": "a", "loads": {"x": True}}).encode(),
        json.dumps({"v": 1, "gateway": "a", "loads": {"x": 1e9}}).encode(),
        encode_loads("a" * 70_000, {}),
    ],
)
def test_data_that_is_no_message_is_passed_over(data: bytes) -> None:
    peers = Peers("me")
    assert not peers.receive(data, 0.0)
    with pytest.raises(ValueError):
        decode_loads(data)


@given(st.text(min_size=1, max_size=50), st.dictionaries(st.text(max_size=20), st.integers(0, 1000), max_size=20))
def test_a_message_decodes_to_what_was_encoded(gateway: str, loads: dict[str, int]) -> None:
    assert decode_loads(encode_loads(gateway, loads)) == (
        gateway,
        {key: count for key, count in loads.items() if count},
        False,
    )


@given(st.binary(max_size=200))
def test_garbage_never_raises(data: bytes) -> None:
    Peers("me").receive(data, 0.0)


@given(ABSURD | st.fixed_dictionaries({"v": st.just(1), "gateway": ABSURD, "loads": ABSURD, "leaving": ABSURD}))
@example({"v": 1, "gateway": "g" * 60_000, "loads": {}})
@example({"v": 1, "gateway": "g", "loads": {"GPU-1": Raw("1" * 5000)}})
@example({"v": 1, "gateway": "g", "loads": {"GPU-1": Raw("NaN")}})
def test_an_absurd_gateway_does_not_change_the_loads_of_others(message: Any) -> None:
    peers = Peers("me")
    peers.receive(encode_loads("a", {"GPU-1": 2}), 0.0)
    peers.receive(json_bytes(message), 0.0)
    assert 2 <= peers.total_load("GPU-1", 0.0) <= 1_000_002


def test_repr_tells_the_state() -> None:
    peers = Peers("me")
    peers.receive(encode_loads("a", {"GPU-1": 2}), 0.0)
    assert repr(peers) == "<Peers 1 known>"
