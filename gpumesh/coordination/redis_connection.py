"""``RedisConnection``: runs the script of ``lua/`` on Redis, one step at a time, and receives what is published.

It uses redis-py's connections without its clients and pools. These try again by themselves, and a step must be run once
or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import cache
from typing import Any, NoReturn

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from gpumesh.coordination.lua_scripts import LuaScript, read_lua_script
from gpumesh.coordination.redis_urls import RedisAddress, moved_address
from gpumesh.coordination.timing import Timing
from gpumesh.event_loop.stall_timeout import stall_timeout

LUA_FILES = ("1_gateways.lua", "2_clients.lua", "3_places.lua", "4_step.lua")


class MovedAway(Exception):
    """Another server of the Redis Cluster has the keys of this mesh: that at ``address``."""

    def __init__(self, address: RedisAddress) -> None:
        super().__init__("the keys have moved to another server")
        self.address = address


@cache
def read_script() -> LuaScript:
    return read_lua_script("gpumesh.coordination", LUA_FILES)


class RedisConnection:
    """Two connections to one server: one for steps, one for what is published. ``prefix`` begins all keys of the mesh.

    Errors are those of redis-py, OSError and TimeoutError, and ``MovedAway``. redis-py raises more than it documents
    when a server answers in another protocol. After any error the connection is of no use."""

    def __init__(self, steps: AbstractConnection, published: AbstractConnection, prefix: str, timing: Timing) -> None:
        self._steps = steps
        self._published = published
        self._prefix = prefix
        self._timing = timing
        self._address: RedisAddress | None = None

    def __repr__(self) -> str:
        return f"<RedisConnection {self._steps!r} {self._prefix}>"

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, address: RedisAddress, password: str | None, prefix: str, channels: Sequence[str], timing: Timing
    ) -> AsyncIterator[RedisConnection]:
        """Connects, loads the script and subscribes to the channels ``prefix`` + each of ``channels``."""
        async with contextlib.AsyncExitStack() as stack:
            async with stall_timeout(timing.connect_s):
                if address.sentinels:
                    address = await find_master(address, timing)
                steps = await stack.enter_async_context(_connect(address, password))
                published = await stack.enter_async_context(_connect(address, password))
                connection = cls(steps, published, prefix, timing)
                connection._address = address
                await connection._load_script()
                for channel in channels:
                    await published.send_command("SUBSCRIBE", prefix + channel)
                    await published.read_response()
            yield connection

    async def step(self, request: bytes) -> bytes:
        """Runs the script once. Raises TimeoutError if Redis does not answer in time."""
        digest = read_script().digest
        async with stall_timeout(self._timing.answer_s):
            try:
                answer = await self._ask("EVALSHA", digest, 1, self._prefix, request)
            except NoScriptError:  # Redis was restarted or flushed its scripts
                await self._load_script()
                answer = await self._ask("EVALSHA", digest, 1, self._prefix, request)
        if not isinstance(answer, bytes):
            raise TypeError("the answer is no text")
        return answer

    async def send_last(self, request: bytes) -> None:
        """Lets Redis run a last step without waiting for its answer, even if another step is in flight."""
        digest = read_script().digest
        await self._steps.send_command("EVALSHA", digest, 1, self._prefix, request)

    async def receive(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yields what is published, with its channel without the prefix. Raises TimeoutError if the connection is
        silent for too long although ``ping`` is called at each heartbeat."""
        while True:
            async with stall_timeout(self._timing.heartbeat_s + self._timing.connect_s):
                item = await self._published.read_response()
            # Hundreds of items may come together, each without waiting: the other tasks get their turn.
            await asyncio.sleep(0)
            if not isinstance(item, list):
                raise TypeError("the answer is no list")
            if len(item) == 3 and item[0] == b"message" and isinstance(item[2], bytes):
                channel: bytes = item[1]
                yield channel.decode("utf-8", "replace").removeprefix(self._prefix), item[2]

    async def ping(self) -> None:
        """Lets Redis send something over the connection of ``receive``."""
        await self._published.send_command("PING")

    async def _load_script(self) -> None:
        await self._ask("SCRIPT", "LOAD", read_script().text)

    async def _ask(self, *command: str | bytes | int) -> Any:
        await self._steps.send_command(*command)
        try:
            # The connection stays open when this task is cancelled, so that ``send_last`` can use it.
            return await self._steps.read_response(disconnect_on_error=False)
        except ResponseError as error:
            self._raise_response_error(error)

    def _raise_response_error(self, error: ResponseError) -> NoReturn:
        moved_to = moved_address(error, self._address) if self._address is not None else None
        if moved_to is not None:
            raise MovedAway(moved_to) from error
        raise error


async def open_connection(address: RedisAddress, password: str | None) -> AbstractConnection:
    """A connection of redis-py that has authenticated, and never tries anything again. Raises what redis-py raises."""
    options: dict[str, Any] = {
        **address.options,
        "password": password,
        # All time-outs are ours, see ``stall_timeout``.
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    connection: AbstractConnection = address.connection_class(**options)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]  # untyped in redis-py
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


@contextlib.asynccontextmanager
async def _connect(address: RedisAddress, password: str | None) -> AsyncIterator[AbstractConnection]:
    """As ``open_connection``, and closes the connection at the end."""
    connection = await open_connection(address, password)
    try:
        yield connection
    finally:
        await connection.disconnect(nowait=True)


async def find_master(address: RedisAddress, timing: Timing) -> RedisAddress:
    """Asks the sentinels, one after the other, where the master of the service is. Raises RedisError if none knows."""
    problems = []
    for host, port in address.sentinels:
        try:
            server, password = address.sentinel_address(host, port), address.read_sentinel_password()
            async with stall_timeout(timing.answer_s), _connect(server, password) as sentinel:
                await sentinel.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
                answer = await sentinel.read_response()
        except (RedisError, OSError, TimeoutError) as error:
            problems.append(f"{host}:{port}: {error or type(error).__name__}")
            continue
        if isinstance(answer, list) and len(answer) == 2:
            return address.at(answer[0].decode(), int(answer[1]))
        problems.append(f"{host}:{port} knows no service {address.service!r}")
    raise RedisError("; ".join(problems))
