"""httpcore's network backend with small, paced reads, so that a hostile server cannot hold up the event loop.

h11, which httpx uses, limits the size of a head or a line, but not the work for one read. One read of 64 KiB can hold
ten thousand chunks, or thousands of interim answers. To parse it takes 100 ms, in which no other task runs. So reads
are small, and other tasks run between them. After a read that is mostly line ends there is a pause. The limit of a
head is a third of h11's, because all fields of a head are parsed at once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

READ_BYTES = 4 << 10  # of one read at most
MAX_HEAD_BYTES = 32 << 10
# A read with more line ends than this is followed by a pause. A list of models has fewer, because its lines are longer;
# chunks of one byte have 1,300 line ends in READ_BYTES.
MAX_LINE_ENDS = 256
PAUSE_S = 0.02  # about twice the time that parsing such a read takes


class PacedNetwork(httpcore.AsyncNetworkBackend):
    """httpcore's own backend, with streams whose reads are paced."""

    def __init__(self) -> None:
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _PacedStream(await self._network.connect_tcp(host, port, timeout, local_address, socket_options))

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _PacedStream(await self._network.connect_unix_socket(path, timeout, socket_options))

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


class _PacedStream(httpcore.AsyncNetworkStream):
    """A stream of httpcore whose reads are small and paced, and which limits the head of each answer."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._head_size: int | None = 0  # bytes read of the answer's head; None after the head's end
        self._tail = b""  # the last bytes read: the blank line that ends a head may be split between two reads

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Reads at most ``READ_BYTES``, then lets other tasks run. Raises RemoteProtocolError for a head that is too
        long."""
        data = await self._stream.read(min(max_bytes, READ_BYTES), timeout)
        is_slow_to_parse = data.count(b"\n") > MAX_LINE_ENDS
        await asyncio.sleep(PAUSE_S if is_slow_to_parse else 0)  # with 0, each other task that is ready runs once
        if self._head_size is not None:
            self._check_head_size(data)
        return data

    def _check_head_size(self, data: bytes) -> None:
        """Counts ``data`` to the answer's head, unless the head ends in it. Raises RemoteProtocolError for a head that
        is too long."""
        assert self._head_size is not None, "the head has ended already"
        self._head_size += len(data)
        data_with_tail = self._tail + data
        if b"\r\n\r\n" in data_with_tail or b"\n\n" in data_with_tail:
            self._head_size = None
        elif self._head_size > MAX_HEAD_BYTES:
            raise httpcore.RemoteProtocolError(f"a head of more than {MAX_HEAD_BYTES >> 10} KiB")
        self._tail = data_with_tail[-3:]  # CR LF CR, if the LF that completes the blank line is in the next read

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._head_size is None:  # the next request on this connection begins
            self._head_size, self._tail = 0, b""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _PacedStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except asyncio.CancelledError:  # httpcore closes the connection after any other exception, but not after this
            await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
