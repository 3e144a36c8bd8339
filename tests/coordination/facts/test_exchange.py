"""Two and more exchanges over a channel in memory, with a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest

from gpumesh.coordination.facts import messages
from gpumesh.coordination.facts.exchange import ASK_INTERVAL_S, CHECK_INTERVAL_S, FactsExchange, OwnLoad
from gpumesh.coordination.facts.messages import LearnedFigures, Presence
from gpumesh.coordination.facts.other_gateways import AWAY_S, MAX_GATEWAYS, SILENT_S, OtherGateways

ONE, TWO = (messages.hash_server("home", key) for key in ("one", "two"))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Network:
    """All gateways of a test. ``is_up``: whether Redis answers."""

    clock: Clock = field(default_factory=Clock)
    gateways: list[Gateway] = field(default_factory=list)
    is_up: bool = True
    sent: list[messages.Message] = field(default_factory=list)

    def pass_seconds(self, seconds: float) -> None:
        for _ in range(round(seconds * 2)):
            self.clock.now += 0.5
            for gateway in self.gateways:
                gateway.exchange.tick()


@dataclass
class Gateway:
    """A gateway as its exchange sees it; it records what the exchange tells."""

    network: Network
    name: str
    drained: set[str] = field(default_factory=set)
    learned: dict[str, LearnedFigures] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)
    changes: int = 0
    checked: list[tuple[str, bool]] = field(default_factory=list)
    taken: list[LearnedFigures] = field(default_factory=list)
    exchange: FactsExchange = field(init=False)

    def __post_init__(self) -> None:
        clock = self.network.clock
        self.exchange = FactsExchange(self, self, host=self.name, clock=clock, wall_clock=clock)
        self.network.gateways.append(self)

    @property
    def is_connected(self) -> bool:
        return self.network.is_up

    def send(self, text: str) -> None:
        self.network.sent.append(messages.decode(text))
        for gateway in self.network.gateways:
            if gateway is not self:
                gateway.exchange.receive(self.name, text)

    def own_load(self) -> OwnLoad:
        return OwnLoad(2, 1, self.drained)

    def note_gateways(self) -> None:
        self.changes += 1

    def check_server(self, server: str, *, is_up: bool) -> None:
        self.checked.append((server, is_up))

    def learned_times(self) -> dict[str, float]:
        return self.known

    def find_learned(self, server: str) -> LearnedFigures | None:
        return self.learned.get(server)

    def take_learned(self, figures: LearnedFigures) -> None:
        self.taken.append(figures)

    def learn(self, server: str, at: float) -> None:
        self.learned[server] = LearnedFigures(server, at, None, msgspec.Raw(b"{}"), msgspec.Raw(b"{}"))


@pytest.fixture
def network() -> Network:
    return Network()


def test_gateways_know_each_other_until_one_is_silent(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b")
    network.pass_seconds(1)
    [(gateway, presence)] = first.exchange.others.presences().items()
    assert (gateway, presence.host, presence.in_flight, presence.queued) == ("b", "b", 2, 1)
    network.gateways.remove(second)
    network.pass_seconds(SILENT_S)
    assert first.exchange.others.presences()
    before = first.changes
    network.pass_seconds(1)
    assert not first.exchange.others.presences()
    assert first.changes == before + 1


def test_a_gateway_that_leaves_is_forgotten_at_once(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b")
    network.pass_seconds(1)
    first.exchange.note_gone(second.name)
    assert not first.exchange.others.presences()


def test_a_drain_holds_as_long_as_its_gateway_is_heard(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b", drained={ONE})
    network.pass_seconds(1)
    assert first.exchange.others.drains() == {ONE: {"b": "b"}}
    assert second.exchange.others.drains() == {}
    second.drained = {TWO}
    network.pass_seconds(1)
    assert first.exchange.others.drains() == {TWO: {"b": "b"}}
    network.gateways.remove(second)
    network.pass_seconds(SILENT_S + 1)
    assert first.exchange.others.drains() == {}


def test_a_drain_outlives_a_short_absence_of_redis(network: Network) -> None:
    first, _ = Gateway(network, "a"), Gateway(network, "b", drained={ONE})
    network.pass_seconds(1)
    network.is_up = False
    network.pass_seconds(20)
    assert first.exchange.others.presences() == {}, "nobody is heard now"
    assert first.exchange.others.drains().keys() == {ONE}
    network.is_up = True
    network.pass_seconds(10)
    assert first.exchange.others.drains().keys() == {ONE}
    network.is_up = False
    network.pass_seconds(AWAY_S + 1)
    assert first.exchange.others.drains() == {}


def test_a_gateway_that_ended_while_redis_was_away_is_forgotten(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b", drained={ONE})
    network.pass_seconds(1)
    network.is_up = False
    network.pass_seconds(5)
    network.gateways.remove(second)
    network.is_up = True
    network.pass_seconds(SILENT_S + 1)
    assert first.exchange.others.drains() == {}


def test_a_failure_is_checked_by_the_others_and_not_more_often_than_the_bound(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b")
    for _ in range(10):
        first.exchange.tell_server_change(ONE, is_up=False)
    first.exchange.tell_server_change(ONE, is_up=True)
    assert (first.checked, second.checked) == ([], [(ONE, False), (ONE, True)])
    network.pass_seconds(CHECK_INTERVAL_S)
    first.exchange.tell_server_change(ONE, is_up=False)
    assert second.checked[2:] == [(ONE, False)]


def test_the_newest_figures_answer_a_question_once(network: Network) -> None:
    asks, old, new, lacks = (Gateway(network, name) for name in "abcd")
    old.learn(ONE, 100.0)
    new.learn(ONE, 200.0)
    asks.known = {ONE: 150.0, TWO: 0.0}
    network.pass_seconds(5)
    assert [figures.learned_at for figures in asks.taken] == [200.0]
    assert sum(isinstance(message, LearnedFigures) for message in network.sent) == 1
    assert lacks.taken == asks.taken, "all hear the answer"
    new.learn(TWO, 10.0)
    network.pass_seconds(ASK_INTERVAL_S)
    assert [figures.server for figures in asks.taken] == [ONE, ONE, TWO]
    asks.exchange.note_new_server()
    network.pass_seconds(2)
    assert len(asks.taken) == 5, "a new server is asked for at once"


def test_figures_of_a_size_that_others_refuse_are_not_sent(network: Network) -> None:
    asks, knows = Gateway(network, "a"), Gateway(network, "b")
    knows.learn(ONE, 100.0)
    knows.learned[ONE] = msgspec.structs.replace(knows.learned[ONE], rates=msgspec.Raw(b'"' + b"x" * 70_000 + b'"'))
    asks.known = {ONE: 0.0}
    network.pass_seconds(5)
    assert not asks.taken


def test_garbage_does_nothing(network: Network) -> None:
    first = Gateway(network, "a")
    network.pass_seconds(1)
    first.exchange.receive("b", "{")
    assert (first.checked, first.exchange.others.presences(), first.changes) == ([], {}, 0)


def test_no_more_gateways_are_kept_than_the_bound() -> None:
    others = OtherGateways()
    others.note_connection(is_up=True, now=0.0)
    for number in range(MAX_GATEWAYS * 2):
        others.receive(str(number), Presence("x", 1, "1", 0.0, 0, 0), 0.0)
    assert len(others.presences()) == MAX_GATEWAYS
