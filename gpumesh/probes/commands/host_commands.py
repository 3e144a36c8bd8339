"""``HostCommands``: runs the probes' commands on the host of one connection, one script at a time.

Over SSH all scripts run in one session (tunnels/remote_shell.py), so only the first waits for the account's login
shell. A script that has not ended in time goes on: the next call waits for the same script, and does not start a second
one. So a hung nvidia-smi, which perhaps nothing can end, hangs once and not once for each probe. What the host has
written so far shows what it is waiting for (``WaitingFor``).

A host whose session ends without the shell's ready line has no POSIX shell (Windows), or it runs none of our commands
(a login shell such as /bin/false, a forced command). Commands are then run one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Protocol

from gpumesh.errors import ExecError
from gpumesh.probes.commands.combined_commands import (
    Argv,
    CommandOutput,
    build_script,
    run_commands,
    run_one_by_one,
)
from gpumesh.probes.commands.shell_session import ShellEnded, ShellFlooded, ShellSession
from gpumesh.probes.smi_tables import OUTPUT_BYTES
from gpumesh.tunnels.base import ExecResult, ShellStream

KILL_AFTER_S = 60.0  # a script that has not ended by then is killed: it may work when it is started again
PROOF = "gpumesh-runs-commands"
"""A host that answers ``echo PROOF`` with this line runs our commands. Any other text is the host's own: it comes from
a login shell, a forced command or a proxy, and says nothing about nvidia-smi."""


class WaitingFor(StrEnum):
    """What a host waits for that has not run all commands in time."""

    LOGIN_SHELL = "login-shell"  # a session was asked for, and our shell has not begun in it
    EARLIER_COMMANDS = "earlier-commands"  # another script of ours
    COMMAND = "command"  # one of the commands


class CommandsUnfinished(Exception):
    """The commands have not all ended in time. ``outputs`` are the outputs of those that have ended, in order; ``None``
    if it is not known which of the commands has not ended.

    ``waited_s``: for how long the host has waited for what ``waiting_for`` says, which may be longer than the call's
    time-out. ``goes_on``: the command still runs, and the next call waits for it; otherwise it was ended.
    """

    def __init__(
        self,
        waiting_for: WaitingFor,
        waited_s: float,
        outputs: Sequence[CommandOutput] | None,
        *,
        goes_on: bool = True,
    ) -> None:
        super().__init__(f"the host has waited {waited_s:.1f} s for: {waiting_for}")
        self.waiting_for = waiting_for
        self.waited_s = waited_s
        self.outputs = None if outputs is None else tuple(outputs)
        self.goes_on = goes_on


class CommandsUnproven(Exception):
    """The host shows by nothing that it runs our commands. ``outputs`` has its answer to each of them, which may all
    the same be true: a forced command may let some commands through. ``text`` is what the host wrote instead of running
    our script; hostile until parsed."""

    def __init__(self, outputs: Sequence[CommandOutput], text: bytes) -> None:
        super().__init__("the host runs no commands")
        self.outputs = tuple(outputs)
        self.text = text


class CommandRoute(Protocol):
    """The part of a tunnel that runs commands on its host; see ``tunnels.base.Tunnel``."""

    async def exec(
        self, argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20, shareable: bool = False
    ) -> ExecResult: ...

    async def open_shell(self) -> ShellStream | None: ...


class HostCommands:
    """Runs commands on the host of one connection of ``tunnel``. ``clock`` returns monotonic seconds.

    ``last_duration_s`` is the time that the last script took in the host's shell; ``None`` before the first has ended.
    """

    def __init__(self, tunnel: CommandRoute, *, clock: Callable[[], float]) -> None:
        self._tunnel = tunnel
        self._clock = clock
        self._lock = asyncio.Lock()
        self._shell: ShellSession | None = None
        # What the host wrote instead of running our shell; ``None``: it runs the shell, or that is not known yet.
        self._text_instead_of_shell: bytes | None = None
        self._runs_commands: bool | None = None  # by ``PROOF``; ``None``: not tried
        # The commands that run one by one, and the outputs of those that have ended.
        self._single_commands: tuple[Argv, ...] = ()
        self._single_outputs: list[CommandOutput] = []  # of those commands that have ended
        self.last_duration_s: float | None = None

    @property
    def has_no_shell(self) -> bool:
        """Whether it is known that the host runs no POSIX shell, so that only single programs can be run there."""
        return self._text_instead_of_shell is not None

    def __repr__(self) -> str:
        state = "no shell" if self._shell is None else repr(self._shell)
        return f"<HostCommands {state}>"

    async def run(
        self, commands: Sequence[Argv], *, timeout_s: float, kill_after_s: float = KILL_AFTER_S
    ) -> list[CommandOutput]:
        """Runs the commands on the host, and returns one output for each, in order. If the output was cut, the commands
        after the cut have empty outputs.

        Raises CommandsUnfinished after ``timeout_s``. The commands then still run, and a call with the same commands
        waits for them. If they have run for longer than ``kill_after_s`` when a call times out, they are killed. Raises
        CommandsUnproven, TunnelDown, and ExecError when the host gives no session.
        """
        script = build_script(commands)
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                if self._text_instead_of_shell is None:
                    outputs = await self._run_in_shell(script, commands, timeout_s, kill_after_s)
                    if outputs is not None:
                        return outputs
                return await self._run_one_by_one(commands, timeout_s, self._text_instead_of_shell or b"")
        except TimeoutError:
            unfinished = self._describe_unfinished(script, timeout_s)
            if self._shell is not None:
                await self._shell.kill_if_overdue()
            raise unfinished from None

    async def _run_in_shell(
        self, script: str, commands: Sequence[Argv], timeout_s: float, kill_after_s: float
    ) -> list[CommandOutput] | None:
        """As ``run``, in the host's shell; ``None`` if the host runs no such shell. Without SSH, in a process."""
        while True:
            if self._shell is None:
                stream = await self._tunnel.open_shell()
                if stream is None:
                    return await self._run_here(commands, timeout_s)
                self._shell = ShellSession(stream, self._clock)
            shell = self._shell
            try:
                outputs = await shell.run(script, len(commands), kill_after_s)
            except ShellEnded as end:
                self._shell = None
                if not shell.was_ready:
                    self._text_instead_of_shell = end.text
                    return None
                if not shell.has_served:
                    raise ExecError("the host ended the session in which commands run") from end
                # It ended since the last script, as sshd's ChannelTimeout does: open it again.
            except ShellFlooded as flood:  # each command would be answered in this way
                self._shell = None
                await shell.close()
                raise CommandsUnproven([CommandOutput(None, b"", is_cut=True)] * len(commands), flood.text) from flood
            except ExecError:
                self._shell = None
                await shell.close()
                if not shell.has_served:
                    raise
                # It was ended for another command, on a host that gives few sessions: open it again.
            else:
                break
        self.last_duration_s = shell.last_duration_s
        if shell.is_cut:
            self._shell = None
            await shell.close()
        missing_output = CommandOutput(None, b"", is_cut=shell.is_cut)
        return outputs + [missing_output] * (len(commands) - len(outputs))

    async def _run_here(self, commands: Sequence[Argv], timeout_s: float) -> list[CommandOutput]:
        """Runs the commands on this machine."""
        # ``shareable``: another node on this machine may have got this answer a moment ago.
        run_command = partial(self._tunnel.exec, shareable=True, limit_bytes=OUTPUT_BYTES)
        return await run_commands(run_command, commands, timeout_s=timeout_s)

    async def _run_one_by_one(self, commands: Sequence[Argv], timeout_s: float, text: bytes) -> list[CommandOutput]:
        """Runs each command in a session of its own. After a time-out, the next call with the same commands begins with
        the first that has not ended: a login shell may need most of the time for each."""
        if self._single_commands != tuple(commands):
            self._single_commands, self._single_outputs = tuple(commands), []
        outputs = self._single_outputs
        run_command = partial(self._tunnel.exec, limit_bytes=OUTPUT_BYTES)
        for command in commands[len(outputs) :]:
            outputs += await run_one_by_one(run_command, (command,), timeout_s=timeout_s + 1.0)
        if self._runs_commands is None:
            result = await run_command(("echo", PROOF), timeout_s=timeout_s + 1.0)
            self._runs_commands = PROOF.encode() in (line.strip() for line in result.stdout.splitlines())
        self._single_commands = ()
        if not self._runs_commands:
            raise CommandsUnproven(outputs, text)
        return outputs

    def _describe_unfinished(self, script: str, timeout_s: float) -> CommandsUnfinished:
        """What the host waits for now, as an error."""
        shell = self._shell
        if self._text_instead_of_shell is not None and not self._runs_commands:
            return CommandsUnfinished(WaitingFor.LOGIN_SHELL, timeout_s, outputs=(), goes_on=False)
        if self._text_instead_of_shell is not None:
            return CommandsUnfinished(WaitingFor.COMMAND, timeout_s, self._single_outputs, goes_on=False)
        if shell is None:
            return CommandsUnfinished(WaitingFor.COMMAND, timeout_s, outputs=None, goes_on=False)
        if not shell.was_ready:
            return CommandsUnfinished(WaitingFor.LOGIN_SHELL, self._clock() - shell.opened_at, outputs=())
        waited_s = self._clock() - shell.started_at
        if shell.script != script:
            return CommandsUnfinished(WaitingFor.EARLIER_COMMANDS, waited_s, outputs=())
        return CommandsUnfinished(WaitingFor.COMMAND, waited_s, shell.outputs)
