"""Gateways that share a Redis: each publishes its loads on one channel when they change and as a heartbeat, and hears
the others'. Nothing is stored there, so nothing is left there. While Redis is away, each goes on alone and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping

import redis.asyncio as redis
from redis.exceptions import RedisError

from gpumesh.cancellation import raise_if_cancelled
from gpumesh.coordination.peers import Peers, encode_loads
from gpumesh.errors import GPUMeshError
from gpumesh.printable import printable

CHANNEL = "gpumesh:loads:1"
HEARTBEAT_S = 1.0
SPACING_S = 0.01  # between two messages of a burst of changes
CONNECT_S = 2.0
ANSWER_S = 2.0
FIRST_S, LONGEST_S = 0.5, 10.0  # of the pauses while Redis is away


class RedisCoordination:
    """``on_change`` is called, on the event loop, when the others' loads or ``problem`` changed.

    ``url`` holds no password; ``password`` is asked for at each connect and kept nowhere.
    """

    def __init__(
        self,
        url: str,
        *,
        password: Callable[[], str | None],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.problem: str | None = None
        self._url = url
        self._password = password
        self._on_change = on_change
        self._clock = clock
        self._name = secrets.token_hex(8)
        self._peers = Peers(self._name)
        self._loads: dict[str, int] = {}
        self._changed = asyncio.Event()

    def publish_loads(self, loads: Mapping[str, int]) -> None:
        told = {key: count for key, count in loads.items() if count > 0}
        if told != self._loads:
            self._loads = told
            self._changed.set()

    def other_gateways_load(self, key: str) -> int:
        return self._peers.total_load(key, self._clock())

    async def run(self) -> None:
        pause_s = FIRST_S
        while True:
            began = self._clock()
            try:
                await self._connected()
            # Not only what redis-py documents: its parser raises ValueError, IndexError, TypeError or RecursionError
            # for what is not Redis's protocol. Whatever answers there, this gateway then goes on alone, and says so.
            except* Exception as group:
                self._is_away(_words(group))
            raise_if_cancelled()
            if self._clock() - began > LONGEST_S:
                pause_s = FIRST_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_S)

    async def _connected(self) -> None:
        """Until the connection is lost: RedisError, OSError or TimeoutError, in a group."""
        client = redis.Redis.from_url(
            self._url,
            password=self._password(),
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            retry_on_timeout=False,
            client_name=f"gpumesh-{self._name}",
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(client.aclose)
            heard = client.pubsub(ignore_subscribe_messages=True)
            stack.push_async_callback(heard.aclose)
            async with asyncio.TaskGroup() as group:
                await heard.subscribe(CHANNEL)
                self.problem = None
                self._on_change()
                group.create_task(self._tell(client))
                await self._hear(heard)

    async def _tell(self, client: redis.Redis) -> None:
        try:
            while True:
                self._changed.clear()
                await client.publish(CHANNEL, encode_loads(self._name, self._loads))
                raise_if_cancelled()
                await asyncio.sleep(SPACING_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await self._changed.wait()
        finally:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    await client.publish(CHANNEL, encode_loads(self._name, {}, leaving=True))

    async def _hear(self, heard: redis.client.PubSub) -> None:
        while True:
            # Our own heartbeat comes back here: silence for longer means that the connection is dead.
            async with asyncio.timeout(HEARTBEAT_S + ANSWER_S):
                message = await heard.get_message(timeout=None)
                await asyncio.sleep(0)  # hundreds may have come together
            data = message.get("data") if message is not None else None
            raise_if_cancelled()
            if isinstance(data, bytes) and self._peers.receive(data, self._clock()):
                self._on_change()

    def _is_away(self, why: str) -> None:
        if self.problem != why:
            self.problem = why
            self._peers.forget_all()
            self._on_change()


def _words(group: BaseExceptionGroup[BaseException]) -> str:
    """The first reason, as a line; redis's own texts name host and port, never the password."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, (RedisError, OSError, GPUMeshError)):
        return f"it does not answer as Redis does ({type(error).__name__})"
    return printable(str(error), 200) or type(error).__name__
