"""A real shell on a terminal, with the completion that `gpumesh --install-completion` sets up, and a person's keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tests.real.command import GPUMESH, Gpumesh
from tests.real.terminal import Terminal, run_on_terminal
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
async def shell(gpumesh: Gpumesh, kind: str) -> AsyncIterator[InteractiveShell]:
    home = gpumesh.home
    (home / "bin").mkdir()
    (home / "bin/show").write_text(_SHOW)
    (home / "bin/show").chmod(0o755)
    (home / "count").write_text("0")
    path = os.pathsep.join((str(home / "bin"), str(GPUMESH.parent), os.environ["PATH"]))
    environment = gpumesh.environment(PATH=path, LC_ALL="C.UTF-8")
    await _install_completion(environment, gpumesh, kind)
    file, text = _SET_UP[kind]
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    with (home / file).open("a") as settings:
        settings.write(f"\n{text}")
    async with run_on_terminal((kind, "-i"), env=environment, cwd=home) as terminal:
        made = InteractiveShell(gpumesh, terminal)
        await wait_until(lambda: "ready0> " in terminal.written, f"{kind}'s prompt")
        yield made


async def _install_completion(environment: dict[str, str], gpumesh: Gpumesh, kind: str) -> None:
    # Typer would find out which shell called it; this test is none.
    environment = {**environment, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    process = await asyncio.create_subprocess_exec(
        str(GPUMESH), "--install-completion", kind, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment, cwd=gpumesh.home,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output
