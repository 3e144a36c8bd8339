"""Hosts for pools: OpenSSH's sshd, llama.cpp's programs on the host's PATH, no GPU; and what runs and listens there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from tests.prerequisites import llama_server
from tests.tunnels.polling import DEADLINE_S
from tests.tunnels.sshd import Sshd

HEAD_PROGRAM = "llama-server"
WORKER_PROGRAM = "ggml-rpc-server"
_LISTENING = "0A"  # the state of a socket in /proc/net/tcp
_LOOPBACK = ("0100007F", "00000000000000000000000001000000")
_TRUE_VERSION, _OTHER_VERSION = (5, 0, 0), (3, 9, 9)


class WorkerFault(StrEnum):
    """What is wrong with the worker's program of a host."""

    MISSING = "missing"
    ENDS = "ends"
    """It ends at once, so that its port refuses."""
    CLOSES = "closes"
    """It accepts connections, and closes them."""
    SILENT = "silent"
    """It accepts connections and never answers: a worker that is busy with another head does so, too."""
    OTHER_VERSION = "other-version"
    """It has another version of llama.cpp's RPC protocol, and says so."""
    HIDDEN_VERSION = "hidden-version"
    """The same, but it is only seen when it is asked over its port."""


# Takes the place of ggml-rpc-server, with the same options.
_FAULTY_WORKER = """\
#!{python}
import socket, struct, sys
fault, version = {fault!r}, {version}
print("Starting RPC server v" + ".".join(map(str, version if fault == "other-version" else {true_version})), flush=True)
address = sys.argv[sys.argv.index("-H") + 1], int(sys.argv[sys.argv.index("-p") + 1])
if fault == "ends":
    sys.exit("this worker ends at once")
try:
    server = socket.create_server(address)
except OSError:
    sys.exit("Failed to create server socket")
held = []
while True:
    connection, _ = server.accept()
    if fault == "closes":
        connection.close()
    elif fault == "silent":
        held.append(connection)
    else:  # the answer to HELLO: its size, the version, and what the connection can
        command, size = struct.unpack("<BQ", connection.recv(9, socket.MSG_WAITALL))
        connection.recv(size, socket.MSG_WAITALL)
        connection.sendall(struct.pack("<Q", 4 + size) + bytes(version) + bytes(1 + size))
        connection.close()
"""


@dataclass(frozen=True)
class ListeningSocket:
    """A socket on which a process of a host listens. ``address`` is in the hexadecimal form of /proc/net/tcp."""

    pid: int
    program: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return self.address in _LOOPBACK


@dataclass
class PoolHost:
    """A host without a GPU. A context manager. ``environment``: more variables of its sessions."""

    name: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    sshd: Sshd = field(init=False)

    def __post_init__(self) -> None:
        self.programs.mkdir(parents=True)
        self.repair_programs()
        # A home of its own: a shell that sshd starts reads ~/.bashrc. It also marks all processes of this host.
        variables = {"HOME": self.folder, "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin", **self.environment}
        surroundings = " ".join(f"{name}={value}" for name, value in variables.items())
        self.sshd = Sshd(self.folder / "sshd", {"SetEnv": surroundings, "LogLevel": "ERROR"})

    @property
    def programs(self) -> Path:
        """The first folder of its PATH."""
        return self.folder / "bin"

    def repair_programs(self) -> None:
        """Puts llama.cpp's programs there as they should be. They compute in one thread, because the threads of all
        hosts share this machine's cores, and wait for each other in busy loops."""
        for name in (HEAD_PROGRAM, WORKER_PROGRAM):
            self.set_program(name, f'#!/bin/sh\nexec {real_program(name)} "$@" -t 1\n')

    def set_program(self, name: str, script: str) -> None:
        # Written beside and renamed: a session may be about to start it.
        path = self.programs / f".{name}"
        path.write_text(script)
        path.chmod(0o755)
        path.rename(self.programs / name)

    def log_server(self) -> Path:
        """Lets llama-server write its log into a file, too; its path."""
        path = self.folder / f"{HEAD_PROGRAM}.log"
        script = f'#!/bin/sh\nexec {real_program(HEAD_PROGRAM)} "$@" -t 1 --log-file {path}\n'
        self.set_program(HEAD_PROGRAM, script)
        return path

    def break_worker(self, fault: WorkerFault) -> None:
        if fault is WorkerFault.MISSING:
            (self.programs / WORKER_PROGRAM).unlink()
            return
        values = {"python": sys.executable, "version": _OTHER_VERSION, "true_version": _TRUE_VERSION}
        self.set_program(WORKER_PROGRAM, _FAULTY_WORKER.format(fault=fault.value, **values))

    def node(self) -> dict[str, Any]:
        """Its entry in mesh.yaml. There is no server of its own behind it."""
        ssh = {
            "host": self.sshd.address,
            "port": self.sshd.port,
            "user": self.sshd.spec().user,
            "identity_file": str(self.sshd.identity),
            "known_hosts": str(self.sshd.known_hosts),
            "agent": False,
        }
        return {"name": self.name, "ssh": ssh, "backend": {"kind": "ollama", "port": 1}}

    async def __aenter__(self) -> Self:
        await self.sshd.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sshd.stop()
        kill(self.processes())

    # -- what runs there ---------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """The processes that sessions have started, also those that have outlived their session, and their commands."""
        mark = f"HOME={self.folder}".encode()
        found = {}
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and mark in _read(name, "environ").split(b"\0"):
                    found[int(name)] = _read(name, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        return {pid: command for pid, command in found.items() if command}

    def running(self) -> dict[int, str]:
        """The processes of llama.cpp's programs, and which program each runs."""
        found = {pid: _executable(pid) for pid in self.processes()}
        return {pid: program for pid, program in found.items() if program in (HEAD_PROGRAM, WORKER_PROGRAM)}

    def kill_program(self, name: str) -> None:
        kill(pid for pid, program in self.running().items() if program == name)

    def pool_processes(self) -> dict[int, str]:
        """The processes that have to do with a pool: all but the lasting commands of the mesh's own probes."""
        names = (HEAD_PROGRAM, WORKER_PROGRAM)
        return {pid: command for pid, command in self.processes().items() if any(name in command for name in names)}

    @property
    def listener(self) -> int:
        """The process of sshd that accepts connections."""
        assert self.sshd.process is not None
        return self.sshd.process.pid

    def sessions(self) -> set[int]:
        """The processes of sshd's connections."""
        return {pid for pid in self.sshd.children() if _executable(pid).startswith("sshd")}

    async def cut_sessions(self) -> None:
        """Kills all connections of sshd, but nothing that they have started."""
        kill(self.sessions())

    def listening(self) -> list[ListeningSocket]:
        """The sockets on which processes of this host listen, those of sshd's connections among them. sshd's own port,
        which is no part of a pool, is not."""
        found = []
        rows = _listening_rows()
        for pid in {*self.processes(), *self.sshd.children()}:
            for inode in _socket_inodes(pid) & rows.keys():
                address, port = rows[inode]
                if port != self.sshd.port:
                    found.append(ListeningSocket(pid, _executable(pid), address, port))
        return found

    async def wait_empty(self, why: str) -> None:
        """Waits until no process of a pool is left. It looks rarely, because it looks at all processes."""
        deadline = time.monotonic() + DEADLINE_S
        while left := self.pool_processes():
            assert time.monotonic() < deadline, f"processes of a pool on {self.name} {why}: {left}"
            await asyncio.sleep(0.2)


def real_program(name: str) -> Path:
    found = llama_server()
    assert found is not None
    return found.with_name(name)


def kill(pids: Iterable[int], signal_number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def _executable(pid: int) -> str:
    """The name of the file that a process executes; empty if it has ended."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""


def _read(pid: str, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _listening_rows() -> dict[str, tuple[str, int]]:
    """Address and port of each listening TCP socket of this machine, by its inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{table}") as file:
            for row in [line.split() for line in file.readlines()[1:]]:
                address, _, port = row[1].partition(":")
                if row[3] == _LISTENING:
                    found[row[9]] = (address, int(port, 16))
    return found


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:["):
                    inodes.add(name[8:-1])
    return inodes
