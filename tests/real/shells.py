"""A real shell on a terminal, with the completion that `gpumesh --install-completion` sets up, and a person's keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.real.command import CAN_WARM, GPUMESH, Gpumesh
from tests.real.terminal import Terminal, run_on_terminal
from tests.real.warm_commands import warm_commands
from tests.tunnels.polling import wait_until

# What each reads when it starts; its prompt shows how many lines have run.
_SET_UP = {
    "bash": (".bashrc", "PS1='ready$(cat ~/count)> '\n"),
    "zsh": (".zshrc", "setopt promptsubst\nPROMPT='ready$(cat ~/count)> '\n"),
    "fish": (".config/fish/config.fish", "function fish_prompt; echo ready(cat ~/count)'> '; end\n"),
}
SHELLS = tuple(_SET_UP)
# Takes the place of what is on the line, so that the shell expands it as ever, and nothing of it is started.
_SHOW = """#!/bin/sh
printf '%s\\0' "$@" >"$HOME/words.$1"
printf '%s' "$1" >"$HOME/count"
"""
# `gpumesh` for the shell: asks the test's process to run the command.
_ASK_FOR_COMMAND = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({socket!r})
connection.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
connection.shutdown(socket.SHUT_WR)
code, out, err = json.load(connection.makefile())
os.write(1, out.encode())
os.write(2, err.encode())
sys.exit(code)
"""


@dataclass
class InteractiveShell:
    """``await shell.complete("run -m qw")`` gives the words that the shell makes of the line, after TAB and Enter."""

    gpumesh: Gpumesh
    terminal: Terminal
    count: int = field(default=0)

    async def complete(self, typed: str) -> list[str]:
        self.count += 1
        # TAB; then Ctrl-A, to the beginning of the line.
        self.terminal.press(f"gpumesh {typed}\t\x01show {self.count} \r")
        await self._prompted()
        words = (self.gpumesh.home / f"words.{self.count}").read_bytes().decode().split("\0")
        assert words[:2] == [str(self.count), "gpumesh"], self.terminal.written
        return words[2:-1]

    async def run(self, line: str) -> None:
        """A line of the shell's own, to its end."""
        self.count += 1
        self.terminal.press(f"{line}; show {self.count}\r")
        await self._prompted()

    async def _prompted(self) -> None:
        await wait_until(lambda: f"ready{self.count}> " in self.terminal.written, "the prompt")


@contextlib.asynccontextmanager
async def shell(gpumesh: Gpumesh, kind: str, *, warm: bool = False) -> AsyncIterator[InteractiveShell]:
    """``warm``: its `gpumesh` is a fork of a process that has imported the modules, instead of the installed script."""
    home = gpumesh.home
    (home / "bin").mkdir()
    (home / "bin/show").write_text(_SHOW)
    (home / "bin/show").chmod(0o755)
    (home / "count").write_text("0")
    # Without this folder fish reads all manual pages of this machine, for half a second of CPU.
    (home / ".local/share/fish/generated_completions").mkdir(parents=True)
    path = os.pathsep.join((str(home / "bin"), str(GPUMESH.parent), os.environ["PATH"]))
    environment = gpumesh.environment(PATH=path, LC_ALL="C.UTF-8")
    await _install_completion(environment, gpumesh, kind)
    file, text = _SET_UP[kind]
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    with (home / file).open("a") as settings:
        settings.write(f"\n{text}")
    async with contextlib.AsyncExitStack() as stack:
        if warm and CAN_WARM:
            await stack.enter_async_context(_warm_command(home / "bin/gpumesh", gpumesh.runtime / "shell"))
        running = run_on_terminal((kind, "-i"), env=environment, cwd=home)
        terminal = await stack.enter_async_context(running)
        made = InteractiveShell(gpumesh, terminal)
        await wait_until(lambda: "ready0> " in terminal.written, f"{kind}'s prompt")
        yield made


@contextlib.asynccontextmanager
async def _warm_command(program: Path, socket: Path) -> AsyncIterator[None]:
    """``program`` runs commands of `gpumesh` in forks (warm_commands.py), until the context ends."""
    running: set[asyncio.Task[Any] | None] = set()  # nobody else holds the tasks of a server's connections

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.current_task())
        arguments, env, folder = json.loads(await reader.read())
        code, out, err = await warm_commands().run((str(GPUMESH), *arguments), env=env, cwd=Path(folder), stdin=None)
        writer.write(json.dumps([code, out.decode(), err.decode()]).encode())
        writer.close()
        with contextlib.suppress(ConnectionError):  # the shell has ended
            await writer.wait_closed()

    program.write_text(_ASK_FOR_COMMAND.format(python=sys.executable, socket=str(socket)))
    program.chmod(0o755)
    try:
        async with await asyncio.start_unix_server(run, socket):
            yield
            await asyncio.gather(*(task for task in running if task is not None))
    finally:
        socket.unlink(missing_ok=True)


async def _install_completion(environment: dict[str, str], gpumesh: Gpumesh, kind: str) -> None:
    # Typer would find out which shell called it; this test is none.
    environment = {**environment, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    process = await asyncio.create_subprocess_exec(
        str(GPUMESH), "--install-completion", kind, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment, cwd=gpumesh.home,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output
