"""The installed command `gpumesh`, run as a person runs it, and what its processes leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.real.terminal import Terminal, run_on_terminal
from tests.real.warm_commands import KEPT_VARIABLES, WarmProcess, warm_commands

GPUMESH = Path(sys.executable).with_name("gpumesh")
CAN_WARM = hasattr(os, "pidfd_open")  # Linux
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
    environment of each of its processes, and of no others.

    ``warm``: a call runs a fork of a process that has imported the modules, instead of the installed script. This is
    quicker (warm_commands.py)."""

    config: Path
    home: Path
    runtime: Path
    warm: bool = False

    @property
    def mark(self) -> bytes:
        return f"XDG_RUNTIME_DIR={self.runtime}".encode()

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        own = {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime), "GPUMESH_CONFIG": str(self.config)}
        return {**kept, "USER": "tester", "TERM": "xterm-256color", **own, **changes}

    async def __call__(self, *arguments: str, stdin: str | None = None, code: int | None = 0) -> CommandResult:
        """Runs it to its end. Its exit code must be ``code``, unless that is ``None``; a traceback is never right."""
        began = time.monotonic()
        async with asyncio.timeout(LIMIT_S):
            exit_code, out, err = await self._run(arguments, stdin)
        ended = CommandResult(exit_code, out.decode(), err.decode(), time.monotonic() - began)
        assert "Traceback" not in ended.err, f"{ended}\n{self.logs()}"
        assert code is None or ended.code == code, f"{ended}\n{self.logs()}"
        return ended

    async def _run(self, arguments: Sequence[str], stdin: str | None) -> tuple[int | None, bytes, bytes]:
        async with self.started(*arguments, stdin=stdin) as process:
            out, err = await process.communicate(None if stdin is None else stdin.encode())
        return process.returncode, out, err

    def logs(self) -> str:
        """What background meshes have written, the last of it."""
        files = sorted(path for path in self.home.rglob("logs/*") if path.is_file())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)

    @contextlib.asynccontextmanager
    async def started(
        self, *arguments: str, stdin: str | None = None
    ) -> AsyncIterator[asyncio.subprocess.Process | WarmProcess]:
        """A running one; killed when the context ends before it does."""
        if self.warm and CAN_WARM:
            command = (str(GPUMESH), *arguments)
            env, has_input = self.environment(), stdin is not None
            async with warm_commands().piped(command, env=env, cwd=self.home, stdin=has_input) as warm:
                yield warm
            return
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
    async def terminal(
        self, *arguments: str, columns: int = 120, rows: int = 40, out: Path | None = None, **environment: str
    ) -> AsyncIterator[Terminal]:
        """A running command on a terminal of its own, killed if it still runs when the context ends. ``out``: the file
        that gets its standard output instead."""
        command = (str(GPUMESH), *arguments)
        env = self.environment(**environment)
        warm = self.warm and CAN_WARM
        running = run_on_terminal(command, env=env, cwd=self.home, columns=columns, rows=rows, out=out, warm=warm)
        async with running as terminal:
            yield terminal

    async def run_on_terminal(self, *arguments: str) -> str:
        """What it writes to a terminal, stdout and stderr together, to its end."""
        async with self.terminal(*arguments) as terminal:
            await terminal.wait_exit()
        return terminal.written

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


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def write_config(path: Path, nodes: list[dict[str, Any]], *, model: str) -> None:
    """JSON is YAML."""
    gateway = {"listen": "127.0.0.1:0", "default_model": model}
    path.write_text(json.dumps({"version": 1, "name": "real", "gateway": gateway, "nodes": nodes}, indent=1))
