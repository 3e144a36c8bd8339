"""The installed command `gpumesh`, run as a person runs it, and what its processes leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import sys
import termios
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tunnels.polling import wait_until

GPUMESH = Path(sys.executable).with_name("gpumesh")
LIMIT_S = 45.0  # for a hung command, so that a test ends; what a command may take is asserted by the tests


@dataclass(frozen=True)
class CommandResult:
    code: int | None
    out: str
    err: str
    wall_s: float

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    def __str__(self) -> str:
        return f"exit {self.code} after {self.wall_s:.1f} s\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@dataclass(frozen=True)
class Gpumesh:
    """``await gpumesh("status", "--json")``. Each has a home and a runtime folder of its own: ``mark`` is in the
    environment of each of its processes, and of no others."""

    config: Path
    home: Path
    runtime: Path

    @property
    def mark(self) -> bytes:
        return f"XDG_RUNTIME_DIR={self.runtime}".encode()

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
        own = {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime), "GPUMESH_CONFIG": str(self.config)}
        return {**kept, "USER": "tester", "TERM": "xterm-256color", **own, **changes}

    async def __call__(self, *arguments: str, stdin: str | None = None, code: int | None = 0) -> CommandResult:
        """Runs it to its end. Its exit code must be ``code``, unless that is ``None``; a traceback is never right."""
        async with self.started(*arguments, stdin=stdin) as process:
            began = time.monotonic()
            async with asyncio.timeout(LIMIT_S):
                out, err = await process.communicate(None if stdin is None else stdin.encode())
        ended = CommandResult(process.returncode, out.decode(), err.decode(), time.monotonic() - began)
        assert "Traceback" not in ended.err, f"{ended}\n{self.logs()}"
        assert code is None or ended.code == code, f"{ended}\n{self.logs()}"
        return ended

    def logs(self) -> str:
        """What background meshes have written, the last of it."""
        files = sorted(path for path in self.home.rglob("logs/*") if path.is_file())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)

    @contextlib.asynccontextmanager
    async def started(self, *arguments: str, stdin: str | None = None) -> AsyncIterator[asyncio.subprocess.Process]:
        """A running one; killed when the context ends before it does."""
        process = await asyncio.create_subprocess_exec(
            str(GPUMESH),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment(),
            cwd=self.home,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    @contextlib.asynccontextmanager
    async def terminal(self, *arguments: str) -> AsyncIterator[Terminal]:
        """A running one on a terminal of its own, of 120 columns; killed when the context ends before it does."""
        controller, its_end = pty.openpty()
        try:
            process = await asyncio.create_subprocess_exec(
                str(GPUMESH),
                *arguments,
                stdin=its_end,
                stdout=its_end,
                stderr=its_end,
                env=self.environment(COLUMNS="120", LINES="40"),
                cwd=self.home,
                start_new_session=True,
                preexec_fn=take_terminal,
            )
        except BaseException:
            os.close(controller)
            raise
        finally:
            os.close(its_end)
        terminal = Terminal(process, controller)
        asyncio.get_running_loop().add_reader(controller, terminal.read)
        try:
            yield terminal
        finally:
            asyncio.get_running_loop().remove_reader(controller)
            os.close(controller)
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def run_on_terminal(self, *arguments: str) -> str:
        """What it writes to a terminal, stdout and stderr together, to its end."""
        async with self.terminal(*arguments) as terminal:
            await terminal.wait_exit()
        return terminal.text

    # -- what is there and what is left ------------------------------------------------------------------------------

    def processes(self) -> set[int]:
        """All that were started by this one, and by those."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
        return found

    def leader(self) -> int:
        """The mesh itself, of the processes that a running one has."""
        (found,) = [pid for pid in self.processes() if _parent(pid) not in self.processes()]
        return found

    def listening(self) -> set[int]:
        """The TCP ports on which its processes listen."""
        inodes = set()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        name = os.readlink(link)
                        if name.startswith("socket:["):
                            inodes.add(name[8:-1])
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}

    def sockets(self) -> list[Path]:
        """All in the runtime folder that is no folder."""
        return [path for path in self.runtime.rglob("*") if not path.is_dir()]

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass
class Terminal:
    """A program's terminal, from the side of the person before it."""

    process: asyncio.subprocess.Process
    controller: int
    written: bytearray = field(default_factory=bytearray)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        return self.written.decode(errors="replace")

    def read(self) -> None:
        try:
            self.written += os.read(self.controller, 65536)
        except OSError:  # EIO: nobody has the terminal open any more
            asyncio.get_running_loop().remove_reader(self.controller)
            self.hung_up.set()

    def press(self, keys: bytes) -> None:
        """``b"\x03"`` is Ctrl-C: the terminal sends SIGINT to all that run on it."""
        os.write(self.controller, keys)

    async def wait_for_text(self, text: str) -> None:
        await wait_until(lambda: text in self.text, f"{text!r} on the terminal")

    async def wait_exit(self) -> int:
        """Its exit status, when it and all that it left on the terminal have ended."""
        async with asyncio.timeout(LIMIT_S):
            status = await self.process.wait()
            await self.hung_up.wait()
        return status


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def take_terminal() -> None:
    """In the new process, which leads a session: its stdin becomes the terminal that Ctrl-C reaches it through."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def write_config(path: Path, nodes: list[dict[str, Any]], *, model: str) -> None:
    """JSON is YAML."""
    gateway = {"listen": "127.0.0.1:0", "default_model": model}
    path.write_text(json.dumps({"version": 1, "name": "real", "gateway": gateway, "nodes": nodes}, indent=1))
