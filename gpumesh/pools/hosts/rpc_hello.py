"""Asks a running ggml-rpc-server for the version of its protocol, over its port: that it runs, and that it fits.

ggml-rpc-server prints nothing when it is ready to accept connections. It serves one client at a time, so this
connection is closed before the head connects. The messages are in llama.cpp's ggml/src/ggml-rpc/ggml-rpc.cpp.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct

from gpumesh.errors import PoolFailed
from gpumesh.pools.hosts.programs import RpcVersion

HELLO_COMMAND = 14
# Since version 4 of the protocol, the request has the client's capabilities: zeros, for plain TCP. Earlier servers want
# an empty request, and hang up at another one.
_REQUESTS = tuple(struct.pack("<BQ", HELLO_COMMAND, size) + bytes(size) for size in (24, 0))
_MAX_ANSWER_BYTES = 256
_ANSWER_SIZE = struct.Struct("<Q")


async def ask_rpc_version(host: str, port: int, *, timeout_s: float = 5.0) -> RpcVersion | None:
    """The version of the protocol; ``None`` if nothing answers there in time. Raises PoolFailed when something else
    than ggml-rpc-server answers."""
    try:
        async with asyncio.timeout(timeout_s):
            for request in _REQUESTS:
                answer = await _ask(host, port, request)
                if answer:
                    return _read_version(answer)
    except (OSError, TimeoutError):
        pass
    return None


async def _ask(host: str, port: int, request: bytes) -> bytes:
    """The answer to a request; empty if the server hung up. Raises OSError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        await writer.drain()
        (size,) = _ANSWER_SIZE.unpack(await reader.readexactly(_ANSWER_SIZE.size))
        if not 3 <= size <= _MAX_ANSWER_BYTES:
            raise PoolFailed(f"port {port} of a worker does not answer as ggml-rpc-server does")
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _read_version(answer: bytes) -> RpcVersion:
    return answer[0], answer[1], answer[2]
