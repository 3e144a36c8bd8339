"""Several commands in one session after another: what a host has said so far decides what it is waiting for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.errors import ExecError
from gpumesh.probes.commands.combined_commands import CommandOutput, build_script
from gpumesh.probes.commands.host_commands import (
    PROOF,
    CommandsUnfinished,
    CommandsUnproven,
    HostCommands,
    WaitingFor,
)
from gpumesh.probes.smi_tables import OUTPUT_BYTES
from gpumesh.tunnels.base import ExecResult, OutputStream
from gpumesh.tunnels.remote_commands.remote_shell import END_LINE, KILL_LINE, READY_LINE
from tests.probes.command_routes import ScriptedRoute, ScriptedShell

COMMANDS = (("hostname",), ("nvidia-smi", "-L"))
SCRIPT = build_script(COMMANDS).encode() + b"\n"
READY = READY_LINE + b"\n"
ANSWER = b"box\n@gpumesh@ 0\nGPU 0\n@gpumesh@ 3\n"
OUTPUTS = [CommandOutput(0, b"box"), CommandOutput(3, b"GPU 0")]
NO_TIME_S = 0.05  # of a call whose host says nothing more
PATIENCE_S = 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def run_nothing(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
    raise AssertionError(f"{argv} was run in a session of its own")


def answering_shell(*answers: bytes) -> ScriptedShell:
    """A shell that gives these answers to the scripts, one after the other, as a real one does."""
    shell = ScriptedShell()
    shell.say(READY)
    remaining = list(answers)

    def on_write(data: bytes) -> None:
        if data in (END_LINE, KILL_LINE):
            shell.say(READY)
        elif remaining:
            shell.say(remaining.pop(0))

    shell.on_write = on_write
    return shell


def make(*shells: ScriptedShell) -> tuple[HostCommands, Clock]:
    clock = Clock()
    return HostCommands(ScriptedRoute(run_nothing, list(shells)), clock=clock), clock


async def unfinished(commands: HostCommands, *, kill_after_s: float = 60.0) -> CommandsUnfinished:
    with pytest.raises(CommandsUnfinished) as caught:
        await commands.run(COMMANDS, timeout_s=NO_TIME_S, kill_after_s=kill_after_s)
    return caught.value


async def test_all_scripts_run_in_one_session() -> None:
    shell = answering_shell(ANSWER, ANSWER)
    commands, _ = make(shell)
    for _ in range(2):
        assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS
    assert shell.written == [SCRIPT, END_LINE, SCRIPT, END_LINE]
    assert repr(commands).startswith("<HostCommands <ShellSession ")


async def test_nothing_is_written_before_the_login_shell_is_through() -> None:
    """It may read its input: what it takes would be missing later."""
    shell = ScriptedShell()
    commands, clock = make(shell)
    shell.say(b"Welcome\n")
    clock.now += 3.0
    error = await unfinished(commands)
    assert (error.waiting_for, error.waited_s, error.goes_on) == (WaitingFor.LOGIN_SHELL, 0.0, True)
    clock.now += 8.0
    error = await unfinished(commands)
    assert (error.waiting_for, error.waited_s) == (WaitingFor.LOGIN_SHELL, 8.0)
    assert shell.written == []
    shell.on_write = lambda data: shell.say(ANSWER) if data == SCRIPT else None
    shell.say(READY)
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS


async def test_a_script_that_runs_is_not_started_again() -> None:
    shell = answering_shell(b"box\n@gpumesh@ 0\n")
    commands, clock = make(shell)
    for seconds in (0.0, 7.0):
        clock.now += seconds
        error = await unfinished(commands)
        assert (error.waiting_for, error.waited_s) == (WaitingFor.COMMAND, seconds)
        assert error.outputs == (CommandOutput(0, b"box"),)
    assert shell.written == [SCRIPT]
    clock.now += 1.0
    shell.say(b"GPU 0\n@gpumesh@ 3\n")
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS
    assert commands.last_duration_s == 8.0


async def test_a_script_is_killed_after_its_own_time_whoever_waits() -> None:
    shell = answering_shell()
    commands, clock = make(shell)
    await unfinished(commands, kill_after_s=10.0)
    clock.now += 9.0
    with pytest.raises(CommandsUnfinished) as caught:
        await commands.run((("df",),), timeout_s=NO_TIME_S, kill_after_s=1.0)
    assert caught.value.waiting_for is WaitingFor.EARLIER_COMMANDS
    assert KILL_LINE not in shell.written
    clock.now += 2.0
    shell.on_write = lambda _: None  # a process that nothing can kill
    for _ in range(2):
        with pytest.raises(CommandsUnfinished):
            await commands.run((("df",),), timeout_s=NO_TIME_S, kill_after_s=1.0)
    assert shell.written == [SCRIPT, KILL_LINE]
    shell.say(READY)
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == [CommandOutput(None, b"")] * 2
    assert shell.written == [SCRIPT, KILL_LINE], "a killed script is collected already"


async def test_a_script_that_ends_while_another_waits_for_it_makes_room() -> None:
    """Nobody calls for the first script any more."""
    shell = answering_shell()
    commands, _ = make(shell)
    await unfinished(commands)
    shell.on_write = lambda data: shell.say(READY if data == END_LINE else b"free\n@gpumesh@ 0\n")
    waiting = asyncio.create_task(commands.run((("df",),), timeout_s=PATIENCE_S))
    await asyncio.sleep(0)
    shell.say(ANSWER)
    assert await waiting == [CommandOutput(0, b"free")]
    assert shell.written[1] == END_LINE


async def test_a_session_that_ended_meanwhile_is_opened_again() -> None:
    first, second = answering_shell(ANSWER), answering_shell(ANSWER)
    commands, _ = make(first, second)
    await commands.run(COMMANDS, timeout_s=PATIENCE_S)
    first.end(0)
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS


@pytest.mark.parametrize("status", [0, None])
async def test_a_session_that_ends_before_it_has_served_is_an_error(status: int | None) -> None:
    """Otherwise a host that ends each session would be asked without end."""
    shell = answering_shell()
    commands, _ = make(shell, answering_shell(ANSWER))
    shell.on_write = lambda _: shell.end(status)
    with pytest.raises(ExecError, match="ended the session"):
        await commands.run(COMMANDS, timeout_s=PATIENCE_S)
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS


async def test_too_much_output_ends_the_session_and_leaves_the_rest_unknown() -> None:
    shell, second = answering_shell(b"box\n@gpumesh@ 0\n" + b"x" * (OUTPUT_BYTES + 1)), answering_shell(ANSWER)
    commands, _ = make(shell, second)
    outputs = await commands.run(COMMANDS, timeout_s=PATIENCE_S)
    assert outputs == [CommandOutput(0, b"box"), CommandOutput(None, b"", is_cut=True)]
    assert shell.closed
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS


async def test_a_login_shell_may_greet_at_length() -> None:
    shell = answering_shell(ANSWER)
    shell.chunks = asyncio.Queue()
    for _ in range(20):
        shell.say(b"Welcome! " * 4000)
        shell.say(b"bash: warning\n", OutputStream.STDERR)
    shell.say(b"\n" + READY)
    commands, _ = make(shell)
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS


@given(st.sets(st.integers(1, 40)), st.booleans())
def test_pieces_may_be_cut_anywhere(cuts: set[int], carriage_returns: bool) -> None:
    def cut(text: bytes) -> list[bytes]:
        text = text.replace(b"\n", b"\r\n") if carriage_returns else text
        marks = sorted({0, len(text), *(mark for mark in cuts if mark < len(text))})
        return [text[start:end] for start, end in itertools.pairwise(marks)]

    async def run() -> None:
        shell = ScriptedShell()

        def say_pieces(text: bytes) -> None:
            for piece in cut(text):
                shell.say(piece)

        shell.on_write = lambda data: say_pieces(READY if data == END_LINE else ANSWER)
        say_pieces(b"Welcome\n" + READY)
        commands, _ = make(shell)
        for _ in range(2):
            outputs = await commands.run(COMMANDS, timeout_s=PATIENCE_S)
            assert [(output.exit_status, output.output.strip()) for output in outputs] == [(0, b"box"), (3, b"GPU 0")]

    asyncio.run(run())


async def test_an_earlier_script_that_writes_too_much_costs_its_session_only() -> None:
    shell, second = answering_shell(), answering_shell(ANSWER)
    commands, _ = make(shell, second)
    with pytest.raises(CommandsUnfinished):
        await commands.run((("df",),), timeout_s=NO_TIME_S)
    shell.say(b"x" * (OUTPUT_BYTES + 1))
    assert await commands.run(COMMANDS, timeout_s=PATIENCE_S) == OUTPUTS
    assert shell.closed


@given(st.lists(st.binary(max_size=60) | st.sampled_from([READY, b"@gpumesh@ 0\n", ANSWER]), max_size=8))
def test_whatever_a_host_writes_the_call_ends(pieces: list[bytes]) -> None:
    async def run() -> None:
        shell, second = ScriptedShell(), ScriptedShell()
        for piece in pieces:
            shell.say(piece)
        for each in (shell, second):
            each.end(0)

        async def refuse(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
            raise ExecError("no session")

        commands = HostCommands(ScriptedRoute(refuse, [shell, second, ScriptedShell()]), clock=Clock())
        with contextlib.suppress(ExecError):
            assert len(await commands.run(COMMANDS, timeout_s=PATIENCE_S)) == 2

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S / 2))


# -- hosts without our shell -----------------------------------------------------------------------------------------


def without_shell(answers: dict[str, ExecResult], text: bytes = b"") -> tuple[HostCommands, ScriptedRoute]:
    """A host that runs each command by itself, and answers by the command's name."""

    async def run(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        del timeout_s
        return answers.get(argv[0], ExecResult(1, b"", b"not here\n"))

    shell = ScriptedShell()
    shell.say(text)
    shell.end(1)
    route = ScriptedRoute(run, [shell])
    return HostCommands(route, clock=Clock()), route


async def test_a_host_without_a_posix_shell_is_asked_command_by_command() -> None:
    echo = ExecResult(0, f"{PROOF}\r\n".encode(), b"")
    commands, route = without_shell({"echo": echo, "hostname": ExecResult(0, b"BOX\r\n", b"")})
    for _ in range(2):
        outputs = await commands.run(COMMANDS, timeout_s=PATIENCE_S)
        assert outputs == [CommandOutput(0, b"BOX\r\n"), CommandOutput(1, b"not here\n")]
    assert [call[0] for call in route.calls] == ["hostname", "nvidia-smi", "echo", "hostname", "nvidia-smi"]
    assert commands.has_no_shell


@pytest.mark.parametrize(
    "answer",
    [
        ExecResult(1, b"", b""),
        ExecResult(0, b"only forwarding here\n", b""),
        ExecResult(0, f"you may not run echo {PROOF}\n".encode(), b""),
        ExecResult(None, b"", b""),
    ],
)
async def test_a_host_runs_commands_only_if_one_had_its_effect(answer: ExecResult) -> None:
    commands, _ = without_shell(dict.fromkeys(("hostname", "nvidia-smi", "echo"), answer), b"\nforwarding only\n")
    with pytest.raises(CommandsUnproven) as caught:
        await commands.run(COMMANDS, timeout_s=PATIENCE_S)
    assert caught.value.text == b"forwarding only"
    assert len(caught.value.outputs) == len(COMMANDS)


async def test_commands_one_by_one_go_on_where_the_time_ended() -> None:
    """A login shell that needs nearly all of the time for each command."""
    started: list[str] = []

    async def run(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        del timeout_s
        started.append(argv[0])
        if started.count(argv[0]) == 1:
            await asyncio.Event().wait()
        return ExecResult(0, PROOF.encode(), b"")

    shell = ScriptedShell()
    shell.end(1)
    commands = HostCommands(ScriptedRoute(run, [shell]), clock=Clock())
    for _ in range(3):
        error = await unfinished(commands)
        assert (error.waiting_for, error.goes_on) == (WaitingFor.LOGIN_SHELL, False), "not proven: no program is blamed"
    outputs = await commands.run(COMMANDS, timeout_s=PATIENCE_S)
    assert len(outputs) == 2
    assert started == ["hostname", "hostname", "nvidia-smi", "nvidia-smi", "echo", "echo"]
