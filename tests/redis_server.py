"""A real redis-server on a Unix socket, which a test may kill, stop for a while, and start again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

from tests.prerequisites import program
from tests.tunnels.polling import wait_until


@dataclass
class RedisServer:
    """A redis-server whose files are in ``folder``. With ``appendonly`` it has all data again after a restart; without
    it, it is empty then. ``options`` are further options of its command line, like ``("--maxmemory", "4mb")``."""

    folder: Path
    appendonly: bool = False
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    socket_name: str = "redis.sock"

    @property
    def socket(self) -> Path:
        return self.folder / self.socket_name

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def start(self) -> None:
        """Returns when the server listens. It may load its data for a moment more."""
        binary = program("redis-server")
        assert binary is not None
        appendonly = "yes" if self.appendonly else "no"
        command = [binary, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", appendonly]
        command += ["--appendfsync", "no"]  # what is written outlives the process; no test cuts the power
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL, cwd=self.folder)
        await wait_until(self._listens, "redis listens")

    def _listens(self) -> bool:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            return client.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        """Ends the server as ``kill -9`` does."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)


@asynccontextmanager
async def run_redis(
    folder: Path, *, appendonly: bool = False, options: tuple[str, ...] = ()
) -> AsyncIterator[RedisServer]:
    server = RedisServer(folder, appendonly, options)
    await server.start()
    try:
        yield server
    finally:
        server.kill()


async def redis_cli(server: RedisServer, *arguments: str) -> str:
    """What redis-cli prints for a command: another client than that of the code under test."""
    binary = program("redis-cli")
    assert binary is not None
    command = (binary, "-s", str(server.socket), *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return output.decode().removesuffix("\n")
