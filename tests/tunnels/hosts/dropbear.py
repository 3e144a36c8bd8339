"""A real dropbear on a loopback port, with an account of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from gpumesh.topology import SshSpec
from tests.prerequisites import program
from tests.tunnels.hosts.account import USER, Account
from tests.tunnels.polling import children
from tests.tunnels.sshd import keygen


@dataclass
class Dropbear:
    """``async with Dropbear(folder, account) as server``. ``arguments`` are more arguments of dropbear."""

    folder: Path
    account: Account
    arguments: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    async def __aenter__(self) -> Dropbear:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = keygen(self.folder / "id_ed25519")
        self.account.authorize(self.identity.with_suffix(".pub").read_text())
        key = self.folder / "host_key"
        made = subprocess.run(
            [str(program("dropbearkey")), "-t", "ed25519", "-f", str(key)],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        (public_key,) = [line for line in made.stdout.splitlines() if line.startswith("ssh-")]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.known_hosts = self.folder / "known_hosts"
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {' '.join(public_key.split()[:2])}\n")
        with (self.folder / "dropbear.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.account.wrapper(), str(program("dropbear")), "-F", "-E", "-r", str(key), "-p",
                 f"127.0.0.1:{self.port}", "-P", str(self.folder / "pid"), *self.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        async with asyncio.timeout(15):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    await writer.wait_closed()
                    return self
                assert self.process.poll() is None, (self.folder / "dropbear.log").read_text()
                await asyncio.sleep(0.01)

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        pending = [self.process.pid]
        while pending:
            pid = pending.pop()
            pending += children(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)

    def spec(self, **changes: object) -> SshSpec:
        given: dict[str, object] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": USER,
            "identity_files": (self.identity,),
            "known_hosts": self.known_hosts,
            "agent": False,
            **changes,
        }
        return SshSpec(**given)  # type: ignore[arg-type]
