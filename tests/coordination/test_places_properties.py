"""Random operations of three gateways against the real script: the places never exceed the limit, and the order holds.

The gateways are ``Places`` without a link: the test does their steps, so each order of events can happen.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpumesh.balancer.base import Priority
from gpumesh.balancer.fair_queue import FairQueue
from gpumesh.coordination.base import PlaceRequest
from gpumesh.coordination.places import LinkState, Places
from gpumesh.coordination.redis_connection import read_script
from gpumesh.coordination.step_messages import PublishedMail, StepRequest, decode_mail, decode_reply, encode_request
from gpumesh.coordination.timing import Timing
from tests.coordination.redis_server import KEY, RedisServer, request
from tests.prerequisites import needs

pytestmark = [pytest.mark.real, needs("redis-server")]

PREFIX = "gpumesh:1:{mesh}:"
# Heartbeats only when the test wants them, and a key that is not used by others may be used alone at once.
TIMING = Timing(heartbeat_s=3600.0, dead_s=3600.0, own_s=3600.0, share_s=0.0, owner_s=0.3)
LIMIT = 2
NAMES = ("one", "two", "three")


@dataclass
class Server:
    """A Redis with a subscription to the mail of each gateway. They serve all examples: connections take time."""

    client: redis.Redis
    subscriptions: dict[str, redis.client.PubSub]

    def reset(self) -> None:
        self.client.flushdb()
        for subscription in self.subscriptions.values():
            while subscription.get_message(timeout=0) is not None:
                pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    asyncio.run(running.start())
    client = running.client()
    client.script_load(read_script().text)
    subscriptions = {name: client.pubsub(ignore_subscribe_messages=True) for name in NAMES}  # type: ignore[no-untyped-call]
    for name, subscription in subscriptions.items():
        subscription.subscribe(f"{PREFIX}to:{name}")
    yield Server(client, subscriptions)
    for subscription in subscriptions.values():
        subscription.close()
    client.close()
    running.stop()


@dataclass
class Gateway:
    """A gateway with a queue in which the oldest request of the highest class goes first."""

    name: str
    server: Server
    limit: int = LIMIT
    waiting: list[PlaceRequest] = field(default_factory=list)
    held: int = 0
    asking: int = 0
    published: list[PublishedMail] = field(default_factory=list)
    served: list[PlaceRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = 100.0
        self.places = Places("mesh", clock=lambda: self.now, on_wanted=lambda: None, timing=TIMING)
        self.places.start_joining()

    # -- what a mesh does ----------------------------------------------------------------------------------------

    def accept(self, wanted: PlaceRequest) -> None:
        """A new request: it takes a place, or asks for one, or waits."""
        if self.waiting or not self.has_room():
            self.wait(wanted)
        else:
            self.place(wanted)

    def has_room(self) -> bool:
        own = self.held + self.asking
        return own + self.places.others_in_flight(KEY, own, self.limit) < self.limit

    def place(self, wanted: PlaceRequest) -> None:
        if self.places.take_now(KEY):
            self.start(wanted)
            return
        self.asking += 1

        def settle(is_granted: bool) -> None:
            self.asking -= 1
            if is_granted:
                self.start(wanted)
            else:
                self.wait(wanted)

        self.places.take(KEY, wanted, settle)

    def start(self, wanted: PlaceRequest) -> None:
        self.held += 1
        self.served.append(wanted)

    def wait(self, wanted: PlaceRequest) -> None:
        self.waiting.append(wanted)
        self.waiting.sort(key=lambda entry: list(Priority).index(entry.priority))
        self.announce()

    def announce(self) -> None:
        best: dict[Priority, PlaceRequest] = {}
        for entry in self.waiting:
            best.setdefault(entry.priority, entry)
        self.places.announce(KEY, list(best.values()))

    def release(self) -> None:
        if self.held:
            self.held -= 1
            self.places.release(KEY, Priority.NORMAL, "ann", 0.0)
            self.look_again()

    def look_again(self) -> None:
        while self.waiting and self.has_room():
            self.place(self.waiting.pop(0))
        self.announce()
        self.places.return_unused_grants()

    # -- what its link does --------------------------------------------------------------------------------------

    def build(self, *, is_heartbeat: bool = False) -> bytes:
        is_heartbeat |= self.places.is_heartbeat_due()
        step = StepRequest(
            self.name,
            self.places.session,
            dead_s=TIMING.dead_s,
            share_s=TIMING.share_s,
            registers=self.places.state is LinkState.JOINING,
            seen=self.places.seen,
            keys=self.places.build_messages(is_heartbeat=is_heartbeat),
        )
        return encode_request(step)

    def ask(self, data: bytes) -> bytes:
        answer = self.server.client.evalsha(read_script().digest, 1, PREFIX, data)
        assert isinstance(answer, bytes)
        return answer

    def step(self, *, is_heartbeat: bool = False) -> None:
        self.now += 0.02
        if self.places.expire():
            self.look_again()
        reply = decode_reply(self.ask(self.build(is_heartbeat=is_heartbeat)))
        if not reply.is_known:
            self.places.start_joining()
            return
        self.places.apply(reply.keys, reply.mail)
        self.look_again()

    def lose_answer(self) -> None:
        """Redis runs the step and its answer is lost: the gateway is alone for a moment, without a new request."""
        self.ask(self.build())
        self.places.go_alone()
        self.look_again()
        self.places.start_joining()

    def read_mail(self) -> None:
        """Takes what was published since, up to now."""
        while (message := self.server.subscriptions[self.name].get_message(timeout=0)) is not None:
            self.published.append(decode_mail(message["data"]))
        while self.published:
            mail = self.published.pop(0)
            self.places.receive(mail.session, mail.mail)
            self.look_again()


def make_fleet(server: Server, *, limit: int = LIMIT) -> list[Gateway]:
    server.reset()
    fleet = [Gateway(name, server, limit) for name in NAMES]
    for gateway in fleet:
        gateway.step()
    return fleet


OPERATIONS = ("accept", "accept", "release", "release", "step", "step", "step", "read_mail", "heartbeat")
STEPS = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2), st.sampled_from(list(Priority))), max_size=80
)


def operate(gateway: Gateway, operation: str, priority: Priority) -> None:
    if operation == "accept":
        gateway.accept(request(gateway.limit, priority=priority))
    elif operation == "heartbeat":
        gateway.step(is_heartbeat=True)
    else:
        getattr(gateway, operation)()


@given(STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_more_places_are_held_than_there_are_and_all_are_served(
    server: Server, steps: list[tuple[str, int, Priority]]
) -> None:
    fleet = make_fleet(server)
    for operation, number, priority in steps:
        operate(fleet[number], operation, priority)
        assert sum(gateway.held for gateway in fleet) <= LIMIT
    drain(fleet)


def drain(fleet: list[Gateway], *, limit: int = LIMIT) -> None:
    """Ends requests until none waits. Fails if a place is never given out, or if Redis counts one that nobody has."""
    for _ in range(400):
        for gateway in fleet:
            gateway.step(is_heartbeat=True)
            gateway.release()
        if not any(gateway.waiting or gateway.held or gateway.asking for gateway in fleet):
            break
    assert not any(gateway.waiting or gateway.held or gateway.asking for gateway in fleet)
    for gateway in fleet * 2:
        gateway.step(is_heartbeat=True)
    last = fleet[0]
    for _ in range(limit):
        last.accept(request(last.limit))
        for gateway in fleet * 2:  # the gateway that used the key alone shares it
            gateway.step(is_heartbeat=True)
    assert last.held == limit, "Redis counts a place that nobody has"


@given(STEPS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lost_answers_and_a_redis_that_forgets_lose_no_place_and_no_request(
    server: Server, steps: list[tuple[str, int, Priority]], chance: random.Random
) -> None:
    fleet = make_fleet(server)
    accepted = 0
    for operation, number, priority in steps:
        gateway = fleet[number]
        event = chance.random()
        if event < 0.1:
            gateway.lose_answer()
        elif event < 0.13:
            server.client.flushdb()
        elif event < 0.16:
            server.client.hdel(f"{PREFIX}gateways", gateway.name)  # as if it had been silent for too long
        elif event < 0.2:  # Redis runs a step that was sent over a connection which the gateway has given up since
            late = gateway.build()
            gateway.places.go_alone()
            gateway.look_again()
            gateway.places.start_joining()
            gateway.step()
            assert not decode_reply(gateway.ask(late)).is_known
        accepted += operation == "accept"
        operate(gateway, operation, priority)
    drain(fleet)
    assert sum(len(gateway.served) for gateway in fleet) == accepted + LIMIT


WAITING = st.tuples(st.integers(0, 2), st.sampled_from(list(Priority)), st.integers(1, 40))


@given(st.lists(WAITING, min_size=2, max_size=16))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gateways_serve_in_the_order_of_one_queue(server: Server, entries: list[tuple[int, Priority, int]]) -> None:
    """Each gateway has one client. The fleet then serves in the order of ``FairQueue`` with all requests. They are so
    few that no class earns a share (``test_a_batch_gets_one_place_of_17``)."""
    fleet = make_fleet(server, limit=1)
    holder = fleet[0]
    holder.accept(request())
    holder.step()
    assert holder.held == 1
    fleet[1].wait(request())  # so that the key is shared
    fleet[1].step()
    holder.step(is_heartbeat=True)
    fleet[1].waiting.clear()
    fleet[1].announce()
    fleet[1].step()
    server.client.delete(*(f"{PREFIX}served:{rank}" for rank in range(3)))
    queue: FairQueue[None] = FairQueue(1000)
    for position, (number, priority, cost) in enumerate(entries):
        name = fleet[number].name
        fleet[number].wait(request(1, priority=priority, client=name, waited_s=100.0 - position, cost=cost * 100.0))
        queue.add(None, priority, float(position), group="all", client=name, tokens=cost * 100.0)
    for gateway in fleet:
        gateway.step(is_heartbeat=True)
    for _ in entries:
        expected = queue.best(["all"])
        assert expected is not None
        queue.take(expected)
        [holder] = [gateway for gateway in fleet if gateway.held]
        holder.release()
        holder.step()
        for gateway in fleet:
            gateway.step()  # takes what it was granted, and announces its next request
            gateway.step()
        [winner] = [gateway for gateway in fleet if gateway.held]
        assert (winner.name, winner.served[-1].priority) == (expected.client, expected.priority)
