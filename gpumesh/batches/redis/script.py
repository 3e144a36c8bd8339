"""``RedisScript``: calls the functions of the Lua files of this room in Redis, each call in one step.

Each function may be called a second time with the same arguments, without doing more than the first call: so a call
whose answer was lost is repeated.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError

from gpumesh.batches.redis.answers import Argument, encode
from gpumesh.batches.redis.connections import Connections
from gpumesh.coordination.lua_scripts import read_lua_script
from gpumesh.coordination.redis_urls import ReadPassword, read_address
from gpumesh.errors import BatchConflict, BatchNotFound, BatchStoreError, GPUMeshError
from gpumesh.event_loop.cancellation import raise_if_cancelled
from gpumesh.text.printable import printable

LUA_FILES = ("common.lua", "files.lua", "batches.lua", "work.lua")
ANSWER_TIMEOUT_S = 5.0
MAX_CALLS = 4  # at the same time
KEY_VERSION = 1


class RedisScript:
    """The functions, for the batches of one mesh in the Redis at ``url``, which holds no password.

    ``password`` and ``sentinel_password`` are called at each connect, and their results are not stored; ``ca_file`` has
    the certificates that may sign the server's. Connects when it is used first. Raises UsageError if ``url`` is no URL
    of Redis.
    """

    def __init__(
        self,
        url: str,
        mesh: str,
        *,
        password: ReadPassword,
        sentinel_password: ReadPassword = lambda: None,
        ca_file: str | None = None,
    ) -> None:
        self.prefix = f"gpumesh:{KEY_VERSION}:{{{mesh}}}:batches"
        self.description = describe_url(url)
        address = read_address(url, ca_file=ca_file, read_sentinel_password=sentinel_password)
        self._connections = Connections(address, password)
        self._text, self._digest = read_lua_script("gpumesh.batches.redis", LUA_FILES)
        self._room = asyncio.Semaphore(MAX_CALLS)

    async def close(self) -> None:
        await self._connections.close()

    async def call(self, function: str, *arguments: Argument) -> list[Any]:
        """Returns the members of the function's answer after the ``ok``: integers, bytes, and lists of them.

        Raises BatchNotFound and BatchConflict if the function says so, and BatchStoreError if Redis cannot be used.
        """
        encoded = tuple(encode(argument) for argument in arguments)
        async with self._room:
            answer = await self._repeat_if_lost(function, encoded)
        raise_if_cancelled()
        match answer:
            case [b"ok", *members]:
                return members
            case [b"not-found", bytes(message)]:
                raise BatchNotFound(printable(message))
            case [b"conflict", bytes(message)]:
                raise BatchConflict(printable(message))
        raise self.wrong_answer()

    async def ask(self, function: str, *arguments: Argument) -> Any:
        """As ``call``, for a function whose answer has one member: returns that."""
        members = await self.call(function, *arguments)
        if len(members) != 1:
            raise self.wrong_answer()
        return members[0]

    async def wait_for_entry(self, stream: str, after: str, timeout_s: float) -> str:
        """Returns the id of the newest entry of a stream when there is one after the id ``after``; ``after`` itself
        when there is none within ``timeout_s``. Raises BatchStoreError."""
        key = f"{self.prefix}:{stream}"
        block = ("BLOCK", max(1, int(timeout_s * 1000)))
        try:
            reply = await self._connections.ask(
                "XREAD", "COUNT", 1, *block, "STREAMS", key, after, timeout_s=timeout_s + ANSWER_TIMEOUT_S
            )
            if not reply:
                return after
            newest = await self._connections.ask("XREVRANGE", key, "+", "-", "COUNT", 1, timeout_s=ANSWER_TIMEOUT_S)
            return _first_id(newest) or after
        except Exception as error:
            await self._connections.close()
            raise self._store_error(error) from error

    async def _repeat_if_lost(self, function: str, arguments: tuple[bytes, ...]) -> Any:
        """Calls the function, and once more if the connection was lost: most often because Redis was restarted, and
        the connection is older."""
        try:
            try:
                return await self._evaluate(function, arguments)
            except (RedisConnectionError, OSError) as error:
                raise_if_cancelled()
                if isinstance(error, TimeoutError):
                    raise
                await self._connections.close()
                return await self._evaluate(function, arguments)
        # redis-py raises more than it documents when a server answers in another protocol (coordination/).
        except Exception as error:
            await self._connections.close()
            raise self._store_error(error) from error

    async def _evaluate(self, function: str, arguments: tuple[bytes, ...]) -> Any:
        keys = (1, self.prefix)
        try:
            return await self._ask("EVALSHA", self._digest, *keys, function, *arguments)
        except NoScriptError:  # Redis is new, or was restarted
            await self._ask("SCRIPT", "LOAD", self._text)
            return await self._ask("EVALSHA", self._digest, *keys, function, *arguments)

    async def _ask(self, *command: str | bytes | int) -> Any:
        return await self._connections.ask(*command, timeout_s=ANSWER_TIMEOUT_S)

    def wrong_answer(self) -> BatchStoreError:
        return BatchStoreError(f"{self.description} does not answer as Redis does")

    def _store_error(self, error: Exception) -> BatchStoreError:
        """The error that says why Redis cannot be used. redis-py's messages name host and port, never the password."""
        hint = "check that `redis.url` in mesh.yaml is right, and that Redis runs and answers"
        if isinstance(error, TimeoutError):
            reason = "it does not answer in time"
        elif isinstance(error, ResponseError) and "'maxmemory'" in str(error):
            reason = "its memory is full (maxmemory)"
            hint = "allow it more memory, or remove batches that have ended: `gpumesh batch rm`"
        elif isinstance(error, (RedisError, OSError, GPUMeshError)):
            reason = printable(str(error), 300) or type(error).__name__
        else:
            reason = f"it does not answer as Redis does ({type(error).__name__})"
        return BatchStoreError(f"{self.description} cannot be used for batches: {reason}", hint=hint)


def _first_id(entries: Any) -> str | None:
    """The id of the first entry of an answer of XREVRANGE."""
    match entries:
        case [[bytes(entry_id), _], *_]:
            return entry_id.decode(errors="replace")
    return None


def describe_url(url: str) -> str:
    """``Redis at host:6379`` or ``Redis at /run/redis.sock``: without user and password."""
    parts = urlsplit(url)
    place = parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]
    return f"Redis at {place}"
