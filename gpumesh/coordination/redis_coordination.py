"""``RedisCoordination``: gateways exchange their loads over one publish/subscribe channel of a Redis that they share.

A gateway publishes its loads when they change, and at each heartbeat. Redis stores nothing, so nothing is left there.
While Redis is away, each gateway works alone, and a finding reports that.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping

import redis.asyncio as redis
from redis.exceptions import RedisError

from gpumesh.balancer.base import Priority
from gpumesh.coordination.peers import Peers, encode_loads
from gpumesh.coordination.single_gateway import SingleGateway
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.cancellation import raise_if_cancelled
from gpumesh.state import Finding, Severity
from gpumesh.text.printable import printable

CHANNEL = "gpumesh:loads:1"
HEARTBEAT_S = 1.0  # a third of ``peers.STALE_S``: one or two lost heartbeats do no harm
MIN_INTERVAL_S = 0.01  # between two messages when the loads change in a burst
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 2.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 10.0  # between two attempts to connect while Redis is away; each pause doubles


class RedisCoordination(SingleGateway):
    """The Coordination over the Redis at ``url``, which holds no password.

    ``password`` is called at each connect, and its result is not stored. ``on_change`` is called, on the event loop,
    when the loads of others or ``problem`` have changed. ``clock`` returns monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        password: Callable[[], str | None],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.problem: str | None = None
        """Why the loads of the other gateways are not known now. ``None``: they are known."""
        self._url = url
        self._password = password
        self._on_change = on_change
        self._clock = clock
        self._name = secrets.token_hex(8)  # of this gateway among the others
        self._peers = Peers(self._name)
        self._own_loads: dict[str, int] = {}  # this gateway's requests in flight, as ``Loads``
        self._own_loads_changed = asyncio.Event()
        self.seen_keys: set[str] = set()

    def __repr__(self) -> str:
        return f"<RedisCoordination {self._name} {self._peers!r} problem {self.problem!r}>"

    def publish_loads(self, loads: Mapping[str, int]) -> None:
        """Sets the loads of this gateway. Another task sends them a moment later, so this call takes little time."""
        busy = {key: count for key, count in loads.items() if count > 0}
        if busy != self._own_loads:
            self._own_loads = busy
            self._own_loads_changed.set()

    def other_gateways_load(self, key: str) -> int:
        return self._peers.total_load(key, self._clock())

    def findings(self) -> tuple[Finding, ...]:
        if self.problem is None:
            return ()
        message = f"other gateways are not heard, this one goes on alone: Redis: {self.problem}"
        hint = "check that `redis.url` is right and answers"
        return (Finding("redis-away", Severity.WARNING, None, message, hint),)

    # -- the connection ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self._stay_connected()

    def take_now(self, key: str) -> bool | None:
        self.publish_loads({**self._own_loads, key: self._own_loads.get(key, 0) + 1})
        return True

    def release(self, key: str, priority: Priority, client: str, cost_correction: float = 0.0) -> None:  # noqa: ARG002
        self.publish_loads({**self._own_loads, key: self._own_loads.get(key, 0) - 1})

    def others_in_flight(self, key: str, own: int, limit: int | None) -> int:  # noqa: ARG002
        self.seen_keys.add(key)
        return self.other_gateways_load(key)

    async def _stay_connected(self) -> None:
        """Connects, and connects again whenever the connection is lost, until it is cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            started_at = self._clock()
            try:
                await self._use_connection()
            # redis-py raises more than it documents: when a server answers in another protocol, its parser raises
            # ValueError, IndexError, TypeError or RecursionError. In each case this gateway works alone, and a finding
            # reports that.
            except* Exception as group:
                self._record_problem(_describe_failure(group))
            raise_if_cancelled()
            if self._clock() - started_at > MAX_PAUSE_S:  # the connection was up for some time: Redis had come back
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def _use_connection(self) -> None:
        """Connects, then sends and receives until the connection is lost. Raises the error, mostly RedisError, OSError
        or TimeoutError, alone or in an exception group."""
        client = redis.Redis.from_url(
            self._url,
            password=self._password(),
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=ANSWER_TIMEOUT_S,
            retry_on_timeout=False,  # ``_stay_connected`` tries again, and reports the problem meanwhile
            client_name=f"gpumesh-{self._name}",
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(client.aclose)
            subscription = client.pubsub(ignore_subscribe_messages=True)
            stack.push_async_callback(subscription.aclose)
            async with asyncio.TaskGroup() as tasks:
                await subscription.subscribe(CHANNEL)
                self.problem = None
                self._on_change()
                tasks.create_task(self._send_messages(client))
                await self._receive_messages(subscription)

    async def _send_messages(self, client: redis.Redis) -> None:
        """Sends this gateway's loads at each change and at each heartbeat, until it is cancelled or Redis fails. At the
        end sends a message that this gateway leaves, if Redis still takes it."""
        try:
            while True:
                self._own_loads_changed.clear()
                await client.publish(CHANNEL, encode_loads(self._name, self._own_loads))
                raise_if_cancelled()
                await asyncio.sleep(MIN_INTERVAL_S)
                with contextlib.suppress(TimeoutError):  # no change for so long: a heartbeat is due
                    async with asyncio.timeout(HEARTBEAT_S):
                        await self._own_loads_changed.wait()
        finally:
            with contextlib.suppress(RedisError, OSError, TimeoutError):  # usually the connection has just been lost
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await client.publish(CHANNEL, encode_loads(self._name, {}, leaving=True))

    async def _receive_messages(self, subscription: redis.client.PubSub) -> None:
        """Takes the messages of all gateways. Raises TimeoutError when no message comes for too long."""
        while True:
            # Our own heartbeat comes back here, so a longer silence means that the connection is dead.
            async with asyncio.timeout(HEARTBEAT_S + ANSWER_TIMEOUT_S):
                message = await subscription.get_message(timeout=None)
                # Hundreds of messages may come together. ``get_message`` returns each without waiting, so the other
                # tasks of the event loop get their turn here.
                await asyncio.sleep(0)
            data = message.get("data") if message is not None else None  # None: the subscription is confirmed
            raise_if_cancelled()
            if isinstance(data, bytes) and self._peers.receive(data, self._clock()):
                self._on_change()

    def _record_problem(self, problem: str) -> None:
        """Sets ``problem``, and forgets the loads of the others: they are not known any more. Does nothing if the
        problem is the same as before."""
        if self.problem != problem:
            self.problem = problem
            self._peers.forget_all()
            self._on_change()


def _describe_failure(group: BaseExceptionGroup[BaseException]) -> str:
    """Returns the first error of the group, as one line. redis-py's messages name host and port, never the password.

    The text of an error that is neither redis-py's, nor the system's, nor ours would tell a person nothing: such an
    error comes from a server that is no Redis.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):  # a group may hold groups
        error = error.exceptions[0]
    if not isinstance(error, (RedisError, OSError, GPUMeshError)):
        return f"it does not answer as Redis does ({type(error).__name__})"
    return printable(str(error), 200) or type(error).__name__
