"""A real redis-server, which a test may kill, stop for a while, and start again."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.prerequisites import program
from tests.tunnels.polling import wait_until


@dataclass
class RedisServer:
    """A redis-server on a Unix socket, and on ``port`` if there is one. Its files are in ``folder``. With the options
    ``APPENDONLY`` it has all data again after a restart; without them, it is empty then."""

    folder: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def start(self) -> None:
        """Returns when the server listens. It may read its data for a moment more."""
        binary = program("redis-server")
        assert binary is not None
        command = [binary, "--port", str(self.port), "--unixsocket", str(self.socket), "--save", ""]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL, cwd=self.folder)
        await wait_until(self._listens, "redis listens")

    def _listens(self) -> bool:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            return client.connect_ex(str(self.socket)) == 0

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        """Ends the server as ``kill -9`` does."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)

    def client(self, **options: object) -> redis.Redis:
        """A client for what a test wants to know or to do itself."""
        return redis.Redis(unix_socket_path=str(self.socket), **options)  # type: ignore[arg-type]


# What is written outlives the process without fsync; no test cuts the power.
APPENDONLY = ("--appendonly", "yes", "--appendfsync", "no")


@asynccontextmanager
async def redis_server(folder: Path, *options: str, port: int = 0) -> AsyncIterator[RedisServer]:
    folder.mkdir(exist_ok=True)
    server = RedisServer(folder, options, port)
    await server.start()
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def redis_cluster(folder: Path) -> AsyncIterator[tuple[RedisServer, RedisServer]]:
    """A Redis Cluster of two servers with ports. The second one has all keys."""
    ports, bus_ports = (free_port(), free_port()), (free_port(), free_port())
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port")
    async with (
        redis_server(folder / "one", *options, str(bus_ports[0]), port=ports[0]) as first,
        redis_server(folder / "two", *options, str(bus_ports[1]), port=ports[1]) as second,
    ):
        clients = first.client(), second.client()
        clients[1].cluster("ADDSLOTSRANGE", 0, 16383)
        clients[0].cluster("MEET", "127.0.0.1", ports[1], bus_ports[1])
        await wait_until(lambda: all(map(_is_in_a_cluster, clients)), "it is a cluster")
        for client in clients:
            client.close()
        yield first, second


def _is_in_a_cluster(client: redis.Redis) -> bool:
    return bool(client.cluster("INFO").get("cluster_state") == "ok")


@asynccontextmanager
async def redis_sentinel(folder: Path, port: int, *lines: str) -> AsyncIterator[None]:
    """A Sentinel at ``port`` with these lines in its file. It may not listen yet."""
    config = folder / "sentinel.conf"
    config.write_text("".join(f"{line}\n" for line in (f"port {port}", *lines)))
    binary = program("redis-server")
    assert binary is not None
    process = await asyncio.create_subprocess_exec(binary, str(config), "--sentinel", stdout=asyncio.subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


def failover_lines(master_port: int) -> tuple[str, ...]:
    """Lets a Sentinel watch the master ``main`` at this port, and replace it soon."""
    return (
        f"sentinel monitor main 127.0.0.1 {master_port} 1",
        "sentinel down-after-milliseconds main 300",
        "sentinel failover-timeout main 3000",
    )


async def redis_cli(server: RedisServer, *arguments: str) -> str:
    """What redis-cli prints for a command."""
    binary = program("redis-cli")
    assert binary is not None
    command = (binary, "-s", str(server.socket), *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return output.decode().removesuffix("\n")
