"""A real OpenSSH sshd on a loopback port, with keys of its own, for one test."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from gpumesh.topology import SshSpec
from tests.tunnels.polling import children

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None or shutil.which("ssh-keygen") is None, reason="needs OpenSSH's sshd")


def keygen(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key. One of RSA is as short as sshd and paramiko still take without a word: a longer one takes seconds."""
    if kind == "ed25519" and not passphrase:
        _write_ed25519(path)
        return path
    size = ("-b", "2048") if kind == "rsa" else ()
    command = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, timeout=30)
    return path


def _write_ed25519(path: Path) -> None:
    """As ``ssh-keygen`` writes them. The program takes several times as long, and there are hundreds of keys."""
    key = Ed25519PrivateKey.generate()
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public + b" test\n")


def port_of_this_worker() -> int:
    """A free port that nobody else takes while an sshd that had it is stopped: it is below the ports that the system
    gives out by itself (32768 and above), and each process of pytest-xdist has its own range."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first = 20_000 + 1500 * worker
    for port in random.sample(range(first, first + 1500), 1500):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@dataclass
class Sshd:
    """``async with Sshd(folder, {"AllowTcpForwarding": "no"}) as sshd``. ``spec`` is the spec of a node for it.

    ``prefix`` comes before the command, for an sshd in a network namespace, where its ``address`` is then.
    """

    folder: Path
    options: dict[str, str] = field(default_factory=dict)
    port: int = 0
    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.host_key = keygen(self.folder / "host_key")
        self.identity = keygen(self.folder / "id_ed25519")
        self.known_hosts = self.folder / "known_hosts"
        self.authorized_keys = self.folder / "authorized_keys"
        self.authorized_keys.write_text(self.identity.with_suffix(".pub").read_text())
        self.authorized_keys.chmod(0o600)

    def write_config(self) -> Path:
        settings = {
            "Port": str(self.port),
            "ListenAddress": self.address,
            "HostKey": str(self.host_key),
            "PidFile": "none",
            "AuthorizedKeysFile": str(self.authorized_keys),
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "yes",
            "MaxStartups": "200",
            "LogLevel": "DEBUG1",
            # A shell that sshd starts reads ~/.bashrc. The one of the person who runs the tests may do anything, and a
            # kill in the middle may do harm (pyenv's leaves a lock, for which every later shell waits 60 s).
            "SetEnv": f"HOME={self.folder}",
            **self.options,
        }
        config = self.folder / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        return config

    async def start(self) -> None:
        if self.port == 0:
            self.port = port_of_this_worker()
        assert SSHD is not None
        Path("/run/sshd").mkdir(exist_ok=True) if os.getuid() == 0 else None
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, SSHD, "-D", "-e", "-f", str(self.write_config())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(15):
            while not await self.says_ssh():  # another test may have taken the port while this sshd was stopped
                assert self.process.poll() is None, self.log()
                await asyncio.sleep(0.01)
        self.known_hosts.write_text(f"[{self.address}]:{self.port} {self.public_host_key}\n")

    async def says_ssh(self) -> bool:
        """Whether an SSH server answers at the port."""
        try:
            reader, writer = await asyncio.open_connection(self.address, self.port)
        except OSError:
            return False
        try:
            return (await reader.read(4)).startswith(b"SSH-")
        except OSError:
            return False
        finally:
            writer.close()

    @property
    def public_host_key(self) -> str:
        return " ".join(self.host_key.with_suffix(".pub").read_text().split()[:2])

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    def children(self) -> list[int]:
        """The processes of its sessions and their children, the oldest first."""
        assert self.process is not None
        pids_of_sessions: list[int] = []
        pending = [self.process.pid]
        while pending:
            pids = children(pending.pop())
            pids_of_sessions += pids
            pending += pids
        return pids_of_sessions

    def kill_sessions(self, signal_number: int = signal.SIGKILL) -> None:
        for pid in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)

    async def stop(self) -> None:
        if self.process is None:
            return
        self.kill_sessions()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        self.process = None

    async def __aenter__(self) -> Sshd:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def spec(self, **changes: object) -> SshSpec:
        given: dict[str, object] = {
            "host": self.address,
            "port": self.port,
            "user": getpass.getuser(),
            "identity_files": (self.identity,),
            "known_hosts": self.known_hosts,
            "agent": False,
            **changes,
        }
        return SshSpec(**given)  # type: ignore[arg-type]


@contextlib.contextmanager
def run_agent(folder: Path, *keys: Path, confirm: bool = False) -> Iterator[Path]:
    """A real ssh-agent that holds these keys, which must have no passphrase; its socket. Certificates beside the keys
    are added, too. ``confirm``: the agent asks ``$SSH_ASKPASS`` before each signature."""
    path = folder / "agent.sock"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not is_listening(path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if keys:
            command = ["ssh-add", "-q", *(["-c"] if confirm else []), *map(str, keys)]
            subprocess.run(command, env={**os.environ, "SSH_AUTH_SOCK": str(path)}, check=True, timeout=20)
        yield path
    finally:
        agent.kill()
        agent.wait()
        path.unlink(missing_ok=True)


def is_listening(path: Path) -> bool:
    """Whether somebody listens at a Unix socket. For a moment the socket exists and refuses."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def listener() -> socket.socket:
    """Like the supervisor's: on loopback, any port."""
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


@contextlib.asynccontextmanager
async def serving(handler: object, *, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A TCP server of ``handler(reader, writer)``; its port. Connections still open at the end are aborted."""
    writers: set[asyncio.StreamWriter] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            await handler(reader, writer)  # type: ignore[operator]
        except ConnectionError:
            pass
        finally:
            writers.discard(writer)
            writer.close()

    server = await asyncio.start_server(handle, host, 0, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        abort(writers)
        await server.wait_closed()


def abort(writers: Iterable[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.transport.abort()
