"""Several commands in one round trip, run by real shells where one is to be had."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.errors import ExecError
from gpumesh.probes.commands.combined_commands import (
    OUTPUT_MARKER,
    Argv,
    CommandOutput,
    build_script,
    run_commands,
    split_script_output,
)
from gpumesh.tunnels.base import ExecResult
from tests.probes.shell_host import ShellHost

PATIENCE_S = 20.0


async def test_each_command_has_its_own_output_and_status(host: ShellHost) -> None:
    host.command("loud", "echo out; echo err >&2; exit 3")
    host.command("silent", "exit 0")
    commands: list[Argv] = [("loud",), ("silent",), ("hostname",), ("no-such-command", "x")]
    loud, silent, name, missing = await run_commands(host.exec, commands, timeout_s=PATIENCE_S)
    assert loud == CommandOutput(3, b"out\nerr"), "errors go wherever they go: stderr counts as well"
    assert silent == CommandOutput(0, b"")
    assert name == CommandOutput(0, b"af4a84245990")
    assert missing.exit_status == 127
    assert len(host.calls) == 1


async def test_arguments_reach_the_command_unchanged(host: ShellHost) -> None:
    hostile = "a b; echo $(id) `id` \"'\\ *"
    host.command("show", 'printf "%s" "$1"')
    (output,) = await run_commands(host.exec, [("show", hostile)], timeout_s=PATIENCE_S)
    assert output.output == hostile.encode()


async def test_output_without_a_line_end_is_kept_apart(host: ShellHost) -> None:
    host.command("bare", "printf abc")
    first, second = await run_commands(host.exec, [("bare",), ("bare",)], timeout_s=PATIENCE_S)
    assert (first, second) == (CommandOutput(0, b"abc"), CommandOutput(0, b"abc"))


async def test_output_that_holds_the_marker_does_not_shift_the_outputs(host: ShellHost) -> None:
    """A host may lie about itself, never about who is asked: the first answer is cut short, and that is all."""
    host.command("liar", f"echo '{OUTPUT_MARKER} 0'; echo lies; exit 1")
    answers = await run_commands(host.exec, [("liar",), ("hostname",)], timeout_s=PATIENCE_S)
    assert len(answers) == 2
    assert answers[0] == CommandOutput(0, b"")


def test_the_script_is_one_line() -> None:
    """sshd hands it to the user's shell, and csh takes no line break inside quotes."""
    assert "\n" not in build_script([("hostname",), ("nvidia-smi", "--x=y")])


async def test_a_host_without_a_posix_shell_is_asked_command_by_command() -> None:
    asked: list[tuple[str, ...]] = []

    async def windows(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        asked.append(tuple(argv))
        if argv[0] == "sh":
            return ExecResult(1, b"", b"'sh' is not recognized as an internal or external command\r\n")
        return ExecResult(0, b"BOX\r\n", b"")

    answers = await run_commands(windows, [("hostname",), ("nvidia-smi", "-L")], timeout_s=PATIENCE_S)
    assert answers == [CommandOutput(0, b"BOX\r\n")] * 2
    assert asked[1:] == [("hostname",), ("nvidia-smi", "-L")]


async def test_output_that_was_cut_leaves_the_rest_unknown() -> None:
    async def cut(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        return ExecResult(None, f"box\n{OUTPUT_MARKER} 0\n0, GPU-8f2".encode(), b"", truncated=True)

    answers = await run_commands(cut, [("hostname",), ("nvidia-smi",), ("x",)], timeout_s=PATIENCE_S)
    assert answers == [CommandOutput(0, b"box"), *[CommandOutput(None, b"", is_cut=True)] * 2]


async def test_a_command_that_is_too_slow_raises_timeout_error(host: ShellHost) -> None:
    host.command("forever", "exec sleep 600")
    with pytest.raises(TimeoutError):
        await run_commands(host.exec, [("forever",)], timeout_s=0.2)


async def test_the_error_of_a_connection_is_raised_unchanged() -> None:
    async def fails(argv: Sequence[str], *, timeout_s: float) -> ExecResult:
        raise ExecError("the host gives no session")

    with pytest.raises(ExecError, match="no session"):
        await run_commands(fails, [("hostname",)], timeout_s=PATIENCE_S)


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="@\r"), max_size=30)


@given(st.lists(st.tuples(TEXT, st.integers(0, 255)), min_size=1, max_size=5), st.booleans())
def test_the_output_of_a_shell_is_split(answers: list[tuple[str, int]], returns: bool) -> None:
    end = "\r\n" if returns else "\n"
    output = "".join(f"{text}{end}{OUTPUT_MARKER} {status}{end}" for text, status in answers).encode()
    outputs = split_script_output(output, len(answers))
    assert [item.exit_status for item in outputs] == [status for _, status in answers]
    assert [item.output.removesuffix(b"\r") for item in outputs] == [text.encode() for text, _ in answers]


@given(st.binary(max_size=300), st.integers(0, 5))
def test_any_output_gives_at_most_one_output_for_each_command(output: bytes, count: int) -> None:
    assert len(split_script_output(output, count)) <= count
