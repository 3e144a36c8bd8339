"""The simulated host's SSH server, asked by OpenSSH's own client."""

import asyncio
import contextlib
import gc
import socket
import subprocess
import threading
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
import pytest

from gpumesh.lab import keys, profile
from gpumesh.lab.host import HostStart, SimHost
from gpumesh.lab.profile import Faults
from tests.prerequisites import needs
from tests.tunnels.polling import wait_until

GET = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Visitor:
    host: SimHost
    folder: Path

    def command(self, *arguments: str, key: str = "id") -> list[str]:
        options = ["-F", "none", "-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}"]
        options += ["-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=10"]
        return ["ssh", *options, "-i", str(self.folder / key), "-p", str(self.host.ssh_port), *arguments]

    async def run(self, *arguments: str, given: bytes | None = None, key: str = "id") -> tuple[int | None, bytes, str]:
        async with self.started(*arguments, key=key) as process:
            async with asyncio.timeout(20):
                out, err = await process.communicate(given)
            return process.returncode, out, err.decode()

    @contextlib.asynccontextmanager
    async def started(self, *arguments: str, key: str = "id") -> AsyncIterator[asyncio.subprocess.Process]:
        pipe = subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self.command(*arguments, key=key), stdin=pipe, stdout=pipe, stderr=pipe
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


@pytest.fixture
async def visitor(tmp_path: Path) -> AsyncIterator[Visitor]:
    host_key = keys.new_key()
    authorized = []
    for name, kind in (("id", "ed25519"), ("rsa", "rsa"), ("stranger", "ed25519")):
        key = keys.new_key(kind)
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(key)
        if name != "stranger":
            authorized.append(keys.public_key_line(key))
    async with SimHost(HostStart(profile.make_host("one", load_s=0.0), host_key, tuple(authorized))) as host:
        assert host.ssh_port is not None
        (tmp_path / "known_hosts").write_text(keys.known_hosts_line(host_key, host.ssh_port) + "\n")
        yield Visitor(host, tmp_path)


@needs("ssh")
@pytest.mark.real
@pytest.mark.parametrize("key", ["id", "rsa"])
async def test_a_command_with_its_output_and_status(visitor: Visitor, key: str) -> None:
    code, out, _ = await visitor.run("root@127.0.0.1", "hostname; nvidia-smi -L; exit 7", key=key)
    hostname, gpu = out.decode().splitlines()
    assert code == 7
    assert hostname == visitor.host.profile.hostname
    assert visitor.host.profile.gpus[0].uuid in gpu


@needs("ssh")
@pytest.mark.real
async def test_standard_input_and_large_output(visitor: Visitor) -> None:
    data = bytes(range(256)) * 4096
    assert (await visitor.run("root@127.0.0.1", "cat", given=data))[:2] == (0, data)
    _, out, _ = await visitor.run("root@127.0.0.1", "seq 200000")
    assert out.splitlines()[-1] == b"200000"


@needs("ssh")
@pytest.mark.real
async def test_who_is_refused(visitor: Visitor) -> None:
    code, _, err = await visitor.run("root@127.0.0.1", "hostname", key="stranger")
    assert (code, "Permission denied (publickey)" in err) == (255, True)
    code, _, err = await visitor.run("somebody@127.0.0.1", "hostname")
    assert (code, "Permission denied" in err) == (255, True)
    await visitor.host.set_faults(Faults(ssh_refuse_key=True))
    assert (await visitor.run("root@127.0.0.1", "hostname"))[0] == 255


@needs("ssh")
@pytest.mark.real
async def test_a_forward_reaches_the_hosts_own_server_and_nothing_else(visitor: Visitor) -> None:
    async with visitor.started("-W", "127.0.0.1:11434", "root@127.0.0.1") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):  # keep-alive: one connection, several exchanges
            process.stdin.write(GET)
            answer = await asyncio.wait_for(process.stdout.readuntil(b"}"), 20)
            assert answer.startswith(b"HTTP/1.1 200 OK")
    for target, words in (("127.0.0.1:9", "connect failed"), ("192.0.2.1:80", "administratively prohibited")):
        code, _, err = await visitor.run("-W", target, "root@127.0.0.1", given=b"")
        assert (code, words in err) == (255, True), err
    await visitor.host.set_faults(Faults(ssh_no_forwarding=True))
    _, _, err = await visitor.run("-W", "127.0.0.1:11434", "root@127.0.0.1", given=b"")
    assert "administratively prohibited" in err


@needs("ssh")
@pytest.mark.real
async def test_a_reverse_forward_reaches_the_client(visitor: Visitor) -> None:
    async def read_and_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got " + await reader.read())
        writer.close()

    assert visitor.host.ssh is not None
    ports = visitor.host.ssh.ports
    own_ports = dict(ports)
    async with await asyncio.start_server(read_and_answer, "127.0.0.1", 0) as server:
        local_port = server.sockets[0].getsockname()[1]
        for target in (local_port, 1):
            forward = ("-N", "-o", "ExitOnForwardFailure=yes", "-R", f"127.0.0.1:7000:127.0.0.1:{target}")
            async with visitor.started(*forward, "root@127.0.0.1"):
                await wait_until(lambda: 7000 in ports, "the port")
                code, _, err = await visitor.run(*forward, "root@127.0.0.1")  # the port is taken
                assert (code, "remote port forwarding failed" in err) == (255, True)
                _, out, _ = await visitor.run("-W", "127.0.0.1:7000", "root@127.0.0.1", given=b"hello")
                assert out == (b"got hello" if target == local_port else b"")
            await wait_until(lambda: ports == own_ports, "the end of the port")
    code, _, err = await visitor.run(
        "-N", "-o", "ExitOnForwardFailure=yes", "-R", "*:7000:127.0.0.1:1", "root@127.0.0.1"
    )
    assert (code, "remote port forwarding failed" in err) == (255, True)


@needs("ssh")
@pytest.mark.real
async def test_no_session_and_dropped_connections(visitor: Visitor) -> None:
    async with visitor.started("root@127.0.0.1", "echo begun; sleep infinity") as process:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"begun\n"
        assert visitor.host.ssh is not None
        assert visitor.host.ssh.connections == 1
        await visitor.host.drop_connections()
        assert await asyncio.wait_for(process.wait(), 20) == 255
    await wait_until(lambda: visitor.host.ssh is not None and visitor.host.ssh.connections == 0, "the connection ended")
    await visitor.host.set_faults(Faults(ssh_no_session=True))
    assert (await visitor.run("root@127.0.0.1", "hostname"))[0] == 255


@needs("ssh")
@pytest.mark.real
async def test_a_command_ends_with_its_client(visitor: Visitor) -> None:
    before = asyncio.all_tasks()
    async with visitor.started("root@127.0.0.1", "echo begun; sleep infinity") as process:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 20)
    await wait_until(lambda: asyncio.all_tasks() <= before, "the command's task ended")


@dataclass
class TargetConnects:
    """The server's connects to targets of forwards. Each waits for ``may_connect``."""

    connecting: threading.Event = field(default_factory=threading.Event)
    may_connect: threading.Event = field(default_factory=threading.Event)
    sockets: list[socket.socket] = field(default_factory=list)


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> TargetConnects:
    made, connect = TargetConnects(), socket.create_connection

    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        made.connecting.set()
        assert made.may_connect.wait(10)
        made.sockets.append(connect(address, timeout))
        return made.sockets[-1]

    monkeypatch.setattr(socket, "create_connection", create_connection)
    return made


def connect_client(visitor: Visitor) -> paramiko.Transport:
    """Blocks until the client is logged in."""
    assert visitor.host.ssh_port is not None
    sock = socket.socket()
    sock.connect(("127.0.0.1", visitor.host.ssh_port))
    client = paramiko.Transport(sock)
    key = paramiko.Ed25519Key.from_private_key_file(str(visitor.folder / "id"))
    client.connect(username="root", pkey=key)
    return client


def open_forward(client: paramiko.Transport) -> None:
    """Blocks until the server has opened the channel, or the connection has ended."""
    with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
        client.open_channel("direct-tcpip", ("127.0.0.1", 11434), ("127.0.0.1", 1), timeout=10)


async def no_connections(visitor: Visitor) -> None:
    await wait_until(lambda: visitor.host.ssh is not None and visitor.host.ssh.connections == 0, "the connection ended")


async def test_a_connection_that_ends_as_its_forward_begins_leaves_no_socket(
    visitor: Visitor, targets: TargetConnects
) -> None:
    client = await asyncio.to_thread(connect_client, visitor)
    server_threads = [thread for thread in threading.enumerate() if type(thread).__module__ == "gpumesh.lab.ssh"]
    targets.may_connect.set()
    # Without an await: the event loop learns in one and the same turn that the forward begins and that it ends.
    open_forward(client)
    client.close()
    for thread in server_threads:
        thread.join(10)
    await no_connections(visitor)
    await asyncio.sleep(0)  # the cancelled task ends
    await asyncio.sleep(0)  # its callback runs
    assert [sock.fileno() for sock in targets.sockets] == [-1]


async def test_a_server_that_ends_while_it_connects_to_a_target_leaves_no_socket(
    visitor: Visitor, targets: TargetConnects
) -> None:
    client = await asyncio.to_thread(connect_client, visitor)
    opening = asyncio.create_task(asyncio.to_thread(open_forward, client))
    assert await asyncio.to_thread(targets.connecting.wait, 10)
    assert visitor.host.ssh is not None
    dropping = asyncio.create_task(visitor.host.ssh.drop_connections())
    await no_connections(visitor)
    targets.may_connect.set()
    await dropping
    assert [sock.fileno() for sock in targets.sockets] == [-1]
    await opening
    client.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_server_that_ends_as_a_client_comes_closes_the_clients_connection(turns: int) -> None:
    start = HostStart(profile.make_host("one", load_s=0.0), keys.new_key(), ())
    with warnings.catch_warnings(record=True) as caught, socket.socket() as client:
        warnings.simplefilter("always", ResourceWarning)
        async with SimHost(start) as host:
            await asyncio.sleep(0)  # the server begins to accept
            client.connect(("127.0.0.1", host.ssh_port))
            for _ in range(turns):
                await asyncio.sleep(0)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_what_is_used_of_paramikos_inside_is_still_there() -> None:
    for name in ("_queue_incoming_channel", "_send_user_message", "_parse_channel_open"):
        assert callable(getattr(paramiko.Transport, name, None)), f"paramiko's {name} is gone: see lab/ssh.py"
