"""``Connections``: asks the Redis of a mesh, over as many connections as there are questions at the same time."""

from __future__ import annotations

from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from gpumesh.coordination.redis_connection import find_master, open_connection
from gpumesh.coordination.redis_urls import ReadPassword, RedisAddress, moved_address
from gpumesh.coordination.timing import Timing
from gpumesh.event_loop.stall_timeout import stall_timeout

CONNECT_TIMEOUT_S = 2.0
MAX_MOVES = 3  # how many times one question follows MOVED
_TIMING = Timing(answer_s=CONNECT_TIMEOUT_S)  # of the sentinels


class Connections:
    """Connects when it is asked first. ``password`` is called at each connect, and its result is not stored."""

    def __init__(self, address: RedisAddress, password: ReadPassword) -> None:
        self._address = address
        self._password = password
        # The server that answers for ``address``: that which the sentinels or a MOVED have named. ``None``: not known.
        self._server: RedisAddress | None = None
        self._free: list[AbstractConnection] = []

    def __repr__(self) -> str:
        return f"<Connections {len(self._free)} free>"

    async def ask(self, *command: str | bytes | int, timeout_s: float) -> Any:
        """Returns the answer. Raises redis-py's errors, OSError and TimeoutError; and what redis-py does not document
        when a server answers in another protocol."""
        for _ in range(MAX_MOVES):
            connection = self._free.pop() if self._free else await self._open()
            is_usable = False
            try:
                async with stall_timeout(timeout_s):
                    await connection.send_command(*command)
                    answer = await connection.read_response()
                is_usable = True
                return answer
            except ResponseError as error:
                server = moved_address(error, self._server or self._address)
                if server is None:
                    # A server that only reads was the master once: the sentinels know the new one.
                    is_usable = not isinstance(error, ReadOnlyError)
                    raise
                await self.close()
                self._server = server
            finally:
                if is_usable:
                    self._free.append(connection)
                else:
                    await connection.disconnect(nowait=True)
        raise RedisError("the servers of the Redis Cluster send from one to the other")

    async def close(self) -> None:
        """Closes all connections that are free, and forgets which server it was. The next question connects anew."""
        self._server = None
        connections, self._free = self._free, []
        for connection in connections:
            await connection.disconnect(nowait=True)

    async def _open(self) -> AbstractConnection:
        async with stall_timeout(CONNECT_TIMEOUT_S):
            if self._server is None:
                is_behind_sentinels = bool(self._address.sentinels)
                self._server = await find_master(self._address, _TIMING) if is_behind_sentinels else self._address
            return await open_connection(self._server, self._password())
