"""Two and more exchanges over a channel in memory, with a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.prefixes import PromptPrint, SharedPromptHasher
from gpumesh.balancer.prefixes.prints import BLOCK_ENDS
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
    prompts: list[tuple[str, ResidencyKey, PromptPrint]] = field(default_factory=list)
    hasher: SharedPromptHasher = field(init=False)
    exchange: FactsExchange = field(init=False)

    def __post_init__(self) -> None:
        clock = self.network.clock
        self.hasher = SharedPromptHasher(self.name.encode() * 16)
        self.exchange = FactsExchange(
            self,
            self,
            gateway_id=self.name,
            host=self.name,
            prompt_secret=self.hasher.secret,
            clock=clock,
            wall_clock=clock,
        )
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

    def note_prompt(self, server: str, key: ResidencyKey, prompt: PromptPrint) -> None:
        self.prompts.append((server, key, prompt))

    def note_prompt_secret(self, secret: bytes) -> None:
        self.hasher.replace_secret(secret)

    def send_prompt(self, server: str, key: ResidencyKey, text: bytes) -> PromptPrint:
        prompt = self.hasher.hash_prompt(key, text)
        assert prompt is not None
        self.exchange.tell_prompt(server, key, prompt)
        return prompt

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
    network.pass_seconds(SILENT_S + 2)
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


KEY = ResidencyKey("m:latest", 8192, (("num_gpu", 99), ("use_mmap", True)))
TEXT = b"You are a helpful assistant. " * 200


def test_gateways_hash_prompts_alike_and_tell_each_other_of_them(network: Network) -> None:
    first = Gateway(network, "a")
    first.send_prompt(ONE, KEY, TEXT)  # nobody is there
    network.pass_seconds(1)
    second, third = Gateway(network, "b"), Gateway(network, "c")
    network.pass_seconds(2)
    assert first.hasher.secret == second.hasher.secret == third.hasher.secret == b"a" * 16
    sent = second.send_prompt(ONE, KEY, TEXT)
    network.pass_seconds(1)
    assert first.prompts == third.prompts == [(ONE, KEY, sent)]
    assert third.hasher.hash_prompt(KEY, TEXT) == sent
    assert third.hasher.hash_prompt(KEY._replace(context=None), TEXT) != sent
    assert second.prompts == []
    network.gateways.remove(first)
    network.pass_seconds(SILENT_S + 1)
    assert Gateway(network, "d").exchange.others.presences() == {}
    network.pass_seconds(2)
    assert {gateway.hasher.secret for gateway in network.gateways} == {b"a" * 16}, (
        "it outlives the gateway that made it"
    )


def test_many_and_long_prompts_fit_into_messages_and_the_rest_is_not_told(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b")
    network.pass_seconds(2)
    long_prompt = first.send_prompt(ONE, KEY, bytes(1 << 20))
    for _ in range(1000):
        first.exchange.tell_prompt(ONE, KEY, long_prompt)
    first.send_prompt(ONE, KEY, b"short" * 120)
    network.pass_seconds(1)
    assert 0 < len(second.prompts) < 1000
    assert {prompt.size for _, _, prompt in second.prompts} == {BLOCK_ENDS[127]}
    strange = ResidencyKey("m", None, (("stop", ("a", "b")),))
    first.send_prompt(ONE, strange, TEXT)
    second.prompts.clear()
    network.pass_seconds(1)
    assert second.prompts == []


def test_hashes_that_were_made_with_another_secret_are_not_taken(network: Network) -> None:
    first, second = Gateway(network, "a"), Gateway(network, "b")
    network.pass_seconds(2)
    first.send_prompt(ONE, KEY, TEXT)
    [message] = first.exchange.prompts.take_messages()
    second.exchange.receive("a", messages.encode(msgspec.structs.replace(message, prompt_secret="0" * 32)))
    for blocks in (b"", b"x" * 8, b"x" * 17, b"x" * 8 * 129):
        damaged = msgspec.structs.replace(message.prompts[0], blocks=blocks)
        second.exchange.receive("a", messages.encode(msgspec.structs.replace(message, prompts=(damaged,))))
    assert second.prompts == []
    second.exchange.receive("a", messages.encode(message))
    assert len(second.prompts) == 1


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
