"""`gpumesh exec` through a real sshd, whose shell runs real commands."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.prerequisites import needs
from tests.real.command import Gpumesh
from tests.real.hosts import RealHost, hosts
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.real, needs("sshd")]

ABSENT = {"kind": "ollama", "port": 9}  # exec needs no server


def own(text: str) -> list[str]:
    """The lines without those that the test's sshd adds because it is asked to say much."""
    return sorted(line for line in text.splitlines() if "debug1: " not in line)


@pytest.fixture
async def two_sshd(gpumesh: Gpumesh, tmp_path: Path) -> AsyncIterator[list[RealHost]]:
    async with hosts(tmp_path / "hosts", [ABSENT, ABSENT]) as made:
        nodes = [host.node() for host in made]
        gpumesh.config.write_text(json.dumps({"gateway": {"listen": "127.0.0.1:0"}, "nodes": nodes}))
        yield made


async def test_output_and_exit_code_are_the_commands_own(gpumesh: Gpumesh, two_sshd: list[RealHost]) -> None:
    ended = await gpumesh("exec", "alpha", "--", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (ended.out, own(ended.err)) == ("out\n", ["err"])
    ended = await gpumesh("exec", "alpha", "--", "printf", "%s|", "a b", "$HOME", "*", "'")
    assert ended.out == "a b|$HOME|*|'|", "each word reaches the host as it is"
    async with gpumesh.started("exec", "alpha", "--", "printf", r"\377\000x") as process:
        assert process.stdout is not None
        assert await process.stdout.read() == b"\xff\x00x", "bytes stay what they are"
    assert (await gpumesh("exec", "alpha", "echo", "--all")).out == "--all\n"
    ended = await gpumesh("exec", "alpha", "--", "no-such-command", code=127)
    assert "no-such-command" in ended.err


async def test_all_hosts_with_their_names_before_each_line(gpumesh: Gpumesh, two_sshd: list[RealHost]) -> None:
    await gpumesh("up", "-d", code=4)  # no server runs there
    script = 'printf "one\\ntwo"; echo wrong >&2'
    ended = await gpumesh("exec", "--all", "--", "sh", "-c", script)
    assert sorted(ended.out.splitlines()) == ["alpha  one", "alpha  two", "beta   one", "beta   two"]
    assert own(ended.err) == ["alpha  wrong", "beta   wrong"]
    ended = await gpumesh("exec", "beta", "alpha", "--", "echo", "--", "x")
    assert sorted(ended.out.splitlines()) == ["alpha  -- x", "beta   -- x"]
    ended = await gpumesh("exec", "alpha", "betta", "--", "echo", "x", code=2)
    assert (ended.out, "did you mean beta?" in ended.err) == ("", True)
    mine = two_sshd[0].folder
    ended = await gpumesh("exec", "--all", "--", "test", "-f", f"{mine}/mode", "-a", "$HOME", "=", "x", code=1)
    assert own(ended.err) == ["alpha  exit status 1", "beta   exit status 1"]
    await gpumesh("down")


async def test_one_host_away_does_not_hold_up_the_other(gpumesh: Gpumesh, two_sshd: list[RealHost]) -> None:
    await two_sshd[1].sshd.stop()
    ended = await gpumesh("exec", "--all", "--", "echo", "here", code=1)
    assert ended.out == "alpha  here\n"
    assert "beta   error: " in ended.err
    assert "nothing listens" in ended.err
    ended = await gpumesh("exec", "beta", "--", "true", code=1)
    assert "beta" in ended.err
    assert "nothing listens" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exec"], "Missing argument"),
        (["exec", "alpha"], "which command?"),
        (["exec", "alpha", "--"], "which command?"),
        (["exec", "--all"], "Missing argument"),
        (["exec", "--", "--", "true"], "on which node?"),
        (["exec", "alpha", "gamma", "--", "true"], "there is no node 'gamma'"),
        (["exec", "gamma", "--", "true"], "there is no node 'gamma'"),
    ],
)
async def test_what_is_refused(gpumesh: Gpumesh, two_sshd: list[RealHost], arguments: list[str], said: str) -> None:
    ended = await gpumesh(*arguments, code=2)
    assert said in ended.err
    assert ended.out == ""


async def test_ctrl_c_ends_the_command_on_the_host(gpumesh: Gpumesh, two_sshd: list[RealHost]) -> None:
    await gpumesh("up", "-d", code=4)  # no server runs there
    beat = two_sshd[0].folder / "beat"
    script = f"while :; do date +%s%N > {beat}; echo beat; sleep 0.1; done"
    async with gpumesh.started("exec", "alpha", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"beat\n"
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            assert await process.wait() == 130

    last = ""

    def quiet() -> bool:
        nonlocal last
        before, last = last, beat.read_text()
        return before == last

    for _ in range(3):
        await wait_until(quiet, "the command on the host has ended")
        await asyncio.sleep(0.3)
    assert quiet()
    await gpumesh("down")


async def test_on_a_terminal_what_a_host_says_is_made_safe(gpumesh: Gpumesh, two_sshd: list[RealHost]) -> None:
    async with gpumesh.terminal("exec", "alpha", "--", "printf", r"a\033[31mb\033]0;owned\007c\n") as shown:
        assert await shown.wait_exit() == 0
        await shown.wait_for_text("c\r\n")
        assert own(shown.written) == ["a[31mb]0;ownedc"]
        assert "\x1b" not in shown.written
    piped = await gpumesh("exec", "alpha", "--", "printf", r"a\033[31mb")
    assert piped.out == "a\x1b[31mb", "into a pipe or a file the bytes are the host's"
    prefixed = await gpumesh("exec", "--all", "--", "printf", r"a\033[31mb\n")
    assert "\x1b" not in prefixed.out
