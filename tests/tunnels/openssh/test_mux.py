"""Requests to a real master, and to servers that only look like one."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.topology import Target
from gpumesh.tunnels.openssh.mux import MuxError, is_master_alive, open_forwards
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, serving
from tests.tunnels.traffic import echo


@contextlib.asynccontextmanager
async def master(folder: Path) -> AsyncIterator[Path]:
    """The control socket of a plain ``ssh``."""
    async with Sshd(folder / "sshd", {"LogLevel": "INFO"}) as sshd:
        control = folder / "c"
        spec = sshd.spec()
        arguments = ["-F", "none", "-i", str(sshd.identity), "-o", f"UserKnownHostsFile={sshd.known_hosts}"]
        process = await asyncio.create_subprocess_exec(
            *("ssh", *arguments, "-o", "StreamLocalBindMask=0177", "-M", "-S", str(control), "-N"),
            *("-p", str(spec.port), "-l", spec.user, spec.host),
        )
        try:
            await wait_until(control.exists, "the control socket")
            yield control
        finally:
            process.terminate()
            await process.wait()


async def through(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.mark.real
@needs("sshd", "ssh")
async def test_requests_to_a_real_master(tmp_path: Path) -> None:
    async with serving(echo) as v4, serving(echo, host="::1") as v6, master(tmp_path) as control:
        assert await is_master_alive(control)
        a, b = tmp_path / "f 0", tmp_path / "f%d"
        await open_forwards(control, [(a, Target("localhost", v4)), (b, Target("::1", v6))])
        assert await through(a, b"four") == b"four"
        assert await through(b, b"six") == b"six"
        assert stat.S_IMODE(a.stat().st_mode) == 0o600
        with pytest.raises(MuxError) as caught:
            await open_forwards(control, [(tmp_path / "none" / "f", Target("localhost", v4))])
        assert str(caught.value).isprintable()
        assert await is_master_alive(control)  # a refused request ends nothing
        await open_forwards(control, [])
    assert not await is_master_alive(control)
    with pytest.raises(MuxError, match="control socket"):
        await open_forwards(control, [(a, Target("localhost", 1))])


def packet(*numbers: int, text: bytes = b"") -> bytes:
    content = struct.pack(f">{len(numbers)}I", *numbers) + text
    return struct.pack(">I", len(content)) + content


HELLO = packet(1, 4)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "ended the talk"),
        (b"\0", "ended the talk"),
        (packet(), "ended the talk"),
        (packet(1, 5), "another version"),
        (packet(7, 4), "another version"),
        (HELLO, "ended the talk"),
        (HELLO + packet(0x80000001, 9), "something else"),
        (HELLO + packet(0x80000004, 0), "0x80000004"),
        (HELLO + packet(0x80000003, 0, text=struct.pack(">I", 9) + b"no\x1b[31m way"), "no"),
        (HELLO + packet(0x80000002, 0), "no reason"),
        (struct.pack(">I", 1 << 31), "too long"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "too long"),
    ],
)
async def test_servers_that_are_no_master(tmp_path: Path, sent: bytes, message: str) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    path = tmp_path / "c"
    async with await asyncio.start_unix_server(speak, path):
        with pytest.raises(MuxError, match=message) as caught:
            await open_forwards(path, [(tmp_path / "f", Target("localhost", 1))])
        assert str(caught.value).isprintable()
        assert not await is_master_alive(path)
