"""``SeveralGateways``: the coordination of a mesh with ``redis`` in mesh.yaml.

All that gateways share passes through steps: each step tells Redis what this gateway holds and wants, and brings what
it gets (``places.py``, ``redis_exchange.py``). One step is in flight at a time; what happens meanwhile goes into the
next one. When Redis does not answer, the gateway goes on alone at once, and joins again when Redis is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from redis.exceptions import RedisError

from gpumesh.balancer.base import Priority
from gpumesh.coordination.base import PlaceRequest
from gpumesh.coordination.places import LinkState, Places
from gpumesh.coordination.redis_connection import MovedAway, RedisConnection
from gpumesh.coordination.redis_exchange import RedisExchange
from gpumesh.coordination.redis_urls import ReadPassword, RedisAddress, read_address
from gpumesh.coordination.step_messages import (
    PublishedMessage,
    StepRequest,
    decode_mail,
    decode_message,
    decode_reply,
    encode_request,
)
from gpumesh.coordination.timing import DEFAULT_TIMING, SLOW_S, AnswerTimes, Timing
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.cancellation import raise_if_cancelled
from gpumesh.state import Finding, Severity
from gpumesh.text.printable import printable
from gpumesh.tunnels.local_system.network_watch import total_sleep_s

E = TypeVar("E", bound=BaseException)

VERSION = 1  # of the keys and the messages
ALL_CHANNEL = "all"
# A gateway has registered. If Redis has been flushed, the others must tell at once what they hold.
JOINED_TOPIC = "joined"
MAX_MOVES = 3  # so often in a row a Redis Cluster may send this gateway to another of its servers
MAX_UNKNOWN = 5  # so often in a row a step may be answered that this gateway is not known


def _total_sleep_s() -> float:
    """``total_sleep_s`` where a change of the wall clock does not look like a sleep; else 0."""
    return total_sleep_s() if sys.platform == "linux" else 0.0


class SeveralGateways:
    """``url`` holds no password; ``password`` and ``sentinel_password`` are called at each connect, and their results
    are not stored. ``on_change`` is that of ``create_coordination``. ``clock`` returns monotonic seconds, and ``slept``
    the seconds that this machine slept: meanwhile other gateways may have taken this one for dead."""

    def __init__(
        self,
        url: str,
        *,
        mesh: str,
        password: Callable[[], str | None],
        on_change: Callable[[Collection[str]], None],
        clock: Callable[[], float],
        ca_file: str | None = None,
        sentinel_password: ReadPassword = lambda: None,
        timing: Timing = DEFAULT_TIMING,
        slept: Callable[[], float] = _total_sleep_s,
    ) -> None:
        self.problem: str | None = None
        """Why places are not shared now. ``None``: they are shared, or the first attempt to connect is under way."""
        self.exchange = RedisExchange(secrets.token_hex(8), on_wanted=self._wake)
        self._address = read_address(url, ca_file=ca_file, read_sentinel_password=sentinel_password)
        self._prefix = f"gpumesh:{VERSION}:{{{mesh}}}:"
        self._password = password
        self._on_change = on_change
        self._clock: Callable[[], float] = lambda: clock() + slept()
        self._timing = timing
        self._answer_times = AnswerTimes()
        self._wanted = asyncio.Event()  # a step is due
        self._places = Places(mesh, clock=self._clock, on_wanted=self._wake, timing=timing)

    def __repr__(self) -> str:
        return f"<SeveralGateways {self.exchange.gateway} {self._places!r} problem {self.problem!r}>"

    # -- places --------------------------------------------------------------------------------------------------

    def take_now(self, key: str) -> bool | None:
        return self._places.take_now(key)

    async def take(self, key: str, request: PlaceRequest) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def give_back() -> None:
            self._places.release(key, request.priority, request.client, -request.cost)

        def settle(is_granted: bool) -> None:
            if not answer.done():
                answer.set_result(is_granted)
            elif is_granted:  # this task was cancelled, and has not run since
                give_back()

        take = self._places.take(key, request, settle)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.result():
                give_back()
            elif take is not None:
                self._places.cancel(key, take)
            raise

    def hold(self, key: str) -> None:
        self._places.hold(key)

    def release(self, key: str, priority: Priority, client: str, cost_correction: float = 0.0) -> None:
        self._places.release(key, priority, client, cost_correction)

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:
        return self._places.others_in_flight(key, own, limit)

    def announce(self, key: str, heads: Sequence[PlaceRequest]) -> None:
        self._places.announce(key, heads)

    def shared_keys(self) -> Collection[str]:
        return self._places.shared_keys()

    def findings(self) -> tuple[Finding, ...]:
        if self.problem is None:
            return self._find_slow_answers()
        message = f"other gateways are not heard, this one goes on alone: Redis: {self.problem}"
        hint = "check that `redis.url` is right and answers"
        return (Finding("redis-away", Severity.WARNING, None, message, hint),)

    def _find_slow_answers(self) -> tuple[Finding, ...]:
        least_s = self._answer_times.least_s
        if least_s is None or least_s < SLOW_S:
            return ()
        message = f"Redis needs {least_s * 1000:.0f} ms and more for an answer: so long requests on shared nodes wait"
        return (Finding("redis-slow", Severity.WARNING, None, message, "use a Redis that is nearer, or less busy"),)

    # -- the link ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        pause_s, address, moves = self._timing.first_pause_s, self._address, 0
        while True:
            started_at = self._clock()
            moved_to: RedisAddress | None = None
            try:
                await self._share_places(address)
            except* MovedAway as group:
                moved_to = _first_error(group, MovedAway).address
                self._go_alone(self.problem)
            # redis-py raises more than it documents: when a server answers in another protocol, its parser raises
            # ValueError, IndexError, TypeError or RecursionError. In each case this gateway works alone, and a finding
            # reports that.
            except* Exception as group:
                self._go_alone(_describe_failure(group))
            raise_if_cancelled()
            was_up = self._clock() - started_at > self._timing.max_pause_s
            moves = 0 if was_up else moves
            if moved_to is not None and moves < MAX_MOVES:
                address, moves = moved_to, moves + 1
                continue
            address, moves = self._address, 0
            if was_up:
                pause_s = self._timing.first_pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, self._timing.max_pause_s)

    async def _share_places(self, address: RedisAddress) -> None:
        """Connects, and shares places until the connection is lost: then raises the error."""
        channels = (f"to:{self.exchange.gateway}", ALL_CHANNEL)
        async with (
            RedisConnection.open(address, self._password(), self._prefix, channels, self._timing) as connection,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(self._receive(connection), name="mail of other gateways")
            await self._send_steps(connection)

    async def _send_steps(self, connection: RedisConnection) -> None:
        """Does the steps until one fails. At the end of this gateway tells the others, if Redis still takes it."""
        self._start_joining()
        try:
            while True:
                self._wanted.clear()
                self._look_again(self._places.expire())
                now, step_at, expiry_at = self._clock(), self._places.next_step_at(), self._places.next_expiry()
                if now >= step_at or self.exchange.has_messages:
                    await self._do_step(connection)
                    continue
                due_at = step_at if expiry_at is None else min(step_at, expiry_at)
                alarm = asyncio.get_running_loop().call_later(max(due_at - now, 0.0), self._wake)
                try:
                    await self._wanted.wait()
                finally:
                    alarm.cancel()
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # the gateway ends in any case, and then its places expire
                async with asyncio.timeout(self._timing.answer_s):
                    await connection.send_last(encode_request(self._build_farewell()))
            raise

    async def _do_step(self, connection: RedisConnection) -> None:
        """Tells Redis what has changed, or everything when a heartbeat is due, and takes over the answer."""
        for _ in range(MAX_UNKNOWN):
            is_heartbeat = self._places.is_heartbeat_due()
            if is_heartbeat:
                await connection.ping()
            request = self._build_request(is_heartbeat=is_heartbeat)
            sent_at = self._clock()
            reply = decode_reply(await connection.step(encode_request(request)))
            self._answer_times.note(self._clock() - sent_at)
            if reply.is_known:
                break
            self._start_joining()  # Redis was flushed, or has taken this gateway for dead
        else:
            raise RedisError("it does not keep what is stored")
        changed = self._places.apply(reply.keys, reply.mail)
        if self.problem is not None:
            self.problem = None
            self._on_change(())
        if not self._places.has_grants():
            await asyncio.sleep(0)  # the requests that got a place go on first; the mesh looks at the nodes afterwards
        self._look_again(changed)
        self.exchange.apply(reply)

    def _build_request(self, *, is_heartbeat: bool) -> StepRequest:
        facts, facts_version = self.exchange.take_facts(is_heartbeat=is_heartbeat)
        return StepRequest(
            gateway=self.exchange.gateway,
            session=self._places.session,
            registers=self._places.state is LinkState.JOINING,
            seen=self._places.seen,
            keys=self._places.build_messages(is_heartbeat=is_heartbeat),
            messages=self.exchange.take_messages(),
            facts=facts,
            facts_version=facts_version,
            dead_s=self._timing.dead_s,
            share_s=self._timing.share_s,
        )

    def _build_farewell(self) -> StepRequest:
        """The last request of this gateway."""
        return StepRequest(
            self.exchange.gateway, self._places.session, dead_s=self._timing.dead_s, share_s=0.0, leaves=True
        )

    async def _receive(self, connection: RedisConnection) -> None:
        """Takes what is published, until the connection is lost: then raises the error."""
        async with contextlib.aclosing(connection.receive()) as items:
            async for channel, data in items:
                if channel == ALL_CHANNEL:
                    self._receive_message(decode_message(data))
                else:
                    published = decode_mail(data)
                    self._look_again(self._places.receive(published.session, published.mail))

    def _receive_message(self, message: PublishedMessage) -> None:
        if message.topic == JOINED_TOPIC:
            if message.gateway != self.exchange.gateway:
                self._places.want_step()
        else:
            self.exchange.receive(message)

    def _look_again(self, keys: Collection[str]) -> None:
        """Lets the mesh look at these keys, and gives back what it was granted there and does not take."""
        if keys:
            self._on_change(keys)
            self._places.return_unused_grants()

    def _start_joining(self) -> None:
        self._places.start_joining()
        self.exchange.start_joining()

    def _go_alone(self, problem: str | None) -> None:
        """The other gateways cannot be asked now: all requests that asked for places get them."""
        is_new = self.problem != problem
        self.problem = problem
        self.exchange.go_alone()
        keys = self._places.go_alone()
        if keys or is_new:
            self._on_change(keys)

    def _wake(self) -> None:
        self._wanted.set()


def _first_error(group: BaseExceptionGroup[BaseException], kind: type[E]) -> E:
    """The first error of this kind in the group, or in a group within it."""
    for error in group.exceptions:
        if isinstance(error, kind):
            return error
        if isinstance(error, BaseExceptionGroup) and (inner := error.subgroup(kind)) is not None:
            return _first_error(inner, kind)
    raise ValueError("the group has no such error")


def _describe_failure(group: BaseExceptionGroup[BaseException]) -> str:
    """Returns the first error of the group, as one line. redis-py's messages name host and port, never the password.

    The text of an error that is neither redis-py's, nor the system's, nor ours would tell a person nothing: such an
    error comes from a server that is no Redis.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):  # a group may hold groups
        error = error.exceptions[0]
    if isinstance(error, TimeoutError) and not str(error):
        return "it does not answer in time"
    if not isinstance(error, (RedisError, OSError, GPUMeshError)):
        return f"it does not answer as Redis does ({type(error).__name__})"
    return printable(str(error), 200) or type(error).__name__
