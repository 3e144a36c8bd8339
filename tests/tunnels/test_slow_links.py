"""A bulk transfer over a slow link: the answer to a ping waits behind it, but the host is alive. Both transports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpumesh.topology import Target, TransportKind
from gpumesh.tunnels.transport import ConnectRequest, ReverseForward
from gpumesh.tunnels.transports import load_connect
from tests.prerequisites import needs
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, listener, port_of_this_worker, serving
from tests.tunnels.supervised import both

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

# What waits in the buffers on the way takes longer than this. But ssh goes on writing only when a third of the kernel's
# buffer of up to 4 MB is free, and that must take less: otherwise nothing moves for so long.
PING_TIMEOUTS_S = {TransportKind.SSHTUNNEL: 0.4, TransportKind.OPENSSH: 1.0}
CHUNK_BYTES = 16 * 1024
BYTES_PER_S = 2e6


@dataclass
class SlowLink:
    """A relay to a port that passes the bytes of each direction on slowly, and none while ``open`` is not set."""

    port: int
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))
        finally:
            far_writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                await self.open.wait()
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(len(data) / BYTES_PER_S)


@contextlib.asynccontextmanager
async def slow_link(sshd: Sshd) -> AsyncIterator[tuple[SlowLink, int]]:
    link = SlowLink(sshd.port)
    link.open.set()
    async with serving(link.relay) as port:
        with sshd.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {sshd.public_host_key}\n")
        yield link, port


async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(bytes(1 << 16))
        await writer.drain()


async def swallow(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


@both
@pytest.mark.parametrize("to_host", [True, False], ids=["to the host", "from the host"])
async def test_a_host_is_alive_while_bytes_flow(
    sshd: Sshd, folder: Path, transport: TransportKind, *, to_host: bool
) -> None:
    ping_timeout_s = PING_TIMEOUTS_S[transport]
    async with contextlib.AsyncExitStack() as stack:
        link, port = await stack.enter_async_context(slow_link(sshd))
        target = await stack.enter_async_context(serving(flood if not to_host else swallow))
        source = await stack.enter_async_context(serving(flood if to_host else swallow))
        local = stack.enter_context(listener())
        remote_port = port_of_this_worker()
        request = ConnectRequest(
            "iceland", sshd.spec(transport=transport, port=port), (Target("127.0.0.1", target),),
            control_dir=str(folder), reverse_forwards=(ReverseForward(remote_port, source),),
        )  # fmt: skip
        connection = await load_connect(transport)(request, [local], RecordedEvents())
        stack.push_async_callback(connection.close)
        rtt_ms = await connection.ping(20.0)
        assert rtt_ms is not None
        assert rtt_ms < ping_timeout_s * 1000
        # ``source`` floods towards the host, ``target`` from the host to here.
        reader, writer = await asyncio.open_connection("127.0.0.1", remote_port if to_host else local.getsockname()[1])
        swallowing = asyncio.create_task(swallow(reader, writer))
        async with asyncio.timeout(40):  # until the answers come late
            while (rtt_ms := await connection.ping(ping_timeout_s)) != ping_timeout_s * 1000:
                assert rtt_ms is not None
        link.open.clear()  # now the network drops all packets
        async with asyncio.timeout(40):
            while await connection.ping(ping_timeout_s) is not None:
                pass
        link.open.set()
        writer.transport.abort()
        await swallowing
