"""Which figures of other gateways a mesh takes, what it tells, and by which keys gateways know a server. Nothing runs
here."""

from __future__ import annotations

import msgspec
import pytest

from gpumesh.balancer.experience import Experience
from gpumesh.balancer.limits import NodeSlots
from gpumesh.balancer.prefixes import SharedPromptHasher
from gpumesh.balancer.rates import ServiceRates
from gpumesh.coordination.facts.messages import LearnedFigures
from gpumesh.mesh.learned_state import build_host_key, build_shared_key
from gpumesh.mesh.nodes.fleet import Fleet
from gpumesh.mesh.nodes.node import Node
from gpumesh.mesh.sharing.fleet_sharing import FleetSharing
from tests.mesh.nodes.build import NodeEvents, make_node, make_spec

MODEL, OTHER = "m:latest", "other:latest"
DAY_S = 86_400.0
NOW = 1_790_000_000.0


class Silence:
    """A channel to no other gateways."""

    is_connected = False

    def send(self, text: str) -> None:
        raise AssertionError(text)


def make_sharing(*, version: str | None = "0.12.6") -> tuple[FleetSharing, Node, str]:
    events = NodeEvents()
    node = make_node(make_spec("http://127.0.0.1:11434"), events)
    fleet = Fleet([node], clock=events.clock)
    sharing = FleetSharing(
        "home",
        fleet,
        Silence(),
        gateway_id="me",
        experience=Experience(),
        hasher=SharedPromptHasher(b"secret of a test"),
        count_requests=lambda: (0, 0),
        on_change=lambda: None,
        learned=None,
        clock=events.clock,
        wall_clock=lambda: NOW,
    )
    node.host_key, node.server_version = build_host_key("GPU-1", url="http://127.0.0.1:11434", kind="ollama"), version
    sharing.note_changes()
    [server] = sharing.learned_times()
    return sharing, node, server


def figures(server: str, learned_at: float, *, token_s: float = 0.01, proven: int = 4) -> LearnedFigures:
    rates = {"format": 1, "decode": {MODEL: {"token_s": token_s, "share": 0.2}}, "prefill": {}, "load": {}}
    limits = {MODEL: {"proven": proven, "search": "known"}}
    raw_rates, raw_limits = (msgspec.Raw(msgspec.json.encode(document)) for document in (rates, limits))
    return LearnedFigures(server, learned_at, "0.12.6", raw_rates, raw_limits)


def measure(node: Node, model: str, token_s: float) -> None:
    node.rates.learn(model, tokens=100, eval_s=100 * token_s)
    node.account.learned_at = node._clock()


def token_ms(node: Node, model: str = MODEL) -> float:
    return round(node.rates.decode_s(model, 1) * 1000.0, 3)


def test_newer_figures_replace_older_ones_of_others_but_not_the_other_way_round() -> None:
    sharing, node, server = make_sharing()
    sharing.take_learned(figures(server, NOW - DAY_S, token_s=0.01))
    assert (token_ms(node), node.learned_slots.proven_slots()) == (10.0, {MODEL: 4})
    assert sharing.learned_times() == {server: NOW - DAY_S}
    sharing.take_learned(figures(server, NOW - 2 * DAY_S, token_s=0.02))
    assert token_ms(node) == 10.0
    sharing.take_learned(figures(server, NOW - 60, token_s=0.03, proven=8))
    assert (token_ms(node), node.learned_slots.proven_slots()) == (30.0, {MODEL: 8})
    sharing.take_learned(figures("0" * 32, NOW, token_s=0.04))
    assert token_ms(node) == 30.0, "another server"


def test_older_figures_of_a_model_that_the_newer_ones_lack_stay() -> None:
    sharing, node, server = make_sharing()
    node.rates.learn(OTHER, tokens=100, eval_s=0.5)  # as from the file: nothing was measured since the start
    sharing.take_learned(figures(server, NOW, token_s=0.01))
    assert (token_ms(node), token_ms(node, OTHER)) == (10.0, 5.0)


def test_what_was_measured_here_stays_and_what_is_lacking_is_taken() -> None:
    sharing, node, server = make_sharing()
    measure(node, OTHER, 0.005)
    sharing.take_learned(figures(server, NOW + 1.0, token_s=0.01))
    assert (token_ms(node), token_ms(node, OTHER)) == (10.0, 5.0)
    sharing.take_learned(figures(server, NOW + 2.0, token_s=0.02))
    assert token_ms(node) == 10.0


def test_limits_are_taken_only_for_the_same_version() -> None:
    sharing, node, server = make_sharing(version="0.13.0")
    sharing.take_learned(figures(server, NOW, proven=8))
    assert node.rates.is_measured(MODEL)
    assert node.learned_slots.proven_slots() == {}


def test_figures_of_models_that_the_server_does_not_list_are_left_out() -> None:
    sharing, node, server = make_sharing()
    node.account.models = frozenset({OTHER})
    sharing.take_learned(figures(server, NOW))
    assert node.rates.is_empty
    assert node.learned_slots.proven_slots() == {}
    node.account.models = frozenset({MODEL})
    sharing.take_learned(figures(server, NOW + 1.0))
    assert node.rates.is_measured(MODEL)


@pytest.mark.parametrize("raw", [b"1", b"null", b'{"format":2}', b"[" * 5000 + b"]" * 5000, b'{"m":{"proven":1e9}}'])
@pytest.mark.parametrize("part", ["rates", "limits"])
def test_damaged_figures_change_nothing(raw: bytes, part: str) -> None:
    sharing, node, server = make_sharing()
    sharing.take_learned(figures(server, NOW - DAY_S, token_s=0.01))
    damaged = msgspec.structs.replace(figures(server, NOW, token_s=0.02), **{part: msgspec.Raw(raw)})
    sharing.take_learned(damaged)
    assert token_ms(node) == 10.0
    assert node.learned_slots.proven_slots() == {MODEL: 4}


def test_a_clock_that_is_ahead_does_not_keep_newer_figures_away_for_long() -> None:
    sharing, _, server = make_sharing()
    sharing.take_learned(figures(server, NOW + 1000 * DAY_S))
    assert sharing.learned_times() == {server: NOW}


def test_what_is_told_is_what_another_gateway_takes() -> None:
    sharing, node, server = make_sharing()
    assert sharing.find_learned(server) is None
    measure(node, MODEL, 0.02)
    told = sharing.find_learned(server)
    assert told is not None
    assert told.learned_at == NOW
    rates, slots = ServiceRates(), NodeSlots()
    rates.restore(msgspec.json.decode(told.rates))
    slots.restore(msgspec.json.decode(told.limits), now=0.0)
    assert round(rates.decode_s(MODEL, 1), 6) == 0.02
    assert sharing.find_learned("0" * 32) is None


def test_a_node_that_has_left_the_mesh_is_not_told_as_drained() -> None:
    sharing, node, server = make_sharing()
    node.role.drained = True
    assert sharing.own_load().drained == {server}
    sharing._fleet.replace_nodes([])
    assert sharing.own_load().drained == frozenset()


def test_the_address_of_a_server_does_not_matter_if_its_gpus_are_known() -> None:
    def key(address: str, gpus: str) -> str:
        return build_shared_key(build_host_key(gpus, url=address, kind="ollama"))

    assert key("http://127.0.0.1:11434", "GPU-1") == key("http://10.0.0.5:11434", "GPU-1")
    assert key("http://127.0.0.1:11434", "GPU-1") != key("http://127.0.0.1:11435", "GPU-1")
    assert key("http://[::1]:1", "GPU-1") != key("http://[::1]:1", "GPU-2")
