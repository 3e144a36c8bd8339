"""The simulated shell, and gpumesh's own probe of it: what the probe asks, the shell must know."""

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from gpumesh.lab import profile
from gpumesh.lab.inference.usage import GpuLoad
from gpumesh.lab.profile import Faults, SmiMode
from gpumesh.lab.shell import SimShell
from gpumesh.probes.nvidia_smi import probe_gpus
from gpumesh.tunnels.base import ExecResult
from gpumesh.tunnels.remote_commands.remote_shell import READY_LINE, SHELL_COMMAND
from tests.probes.command_routes import run_directly

HOST = profile.make_host("one", gpus=2)


@dataclass
class Terminal:
    given: list[bytes] = field(default_factory=list)
    out: bytes = b""
    err: bytes = b""

    async def read(self) -> bytes:
        return self.given.pop(0) if self.given else b""

    async def write(self, data: bytes, *, error: bool = False) -> None:
        if error:
            self.err += data
        else:
            self.out += data


def shell(faults: Faults | None = None) -> SimShell:
    return SimShell(HOST, lambda: GpuLoad(busy=0.5, models=(("m", 5000),)), lambda: faults or Faults())


async def run(text: str, *given: bytes, faults: Faults | None = None) -> tuple[int, str, str]:
    terminal = Terminal(list(given))
    status = await shell(faults).run(text, terminal)
    return status, terminal.out.decode(errors="replace"), terminal.err.decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "status", "out"),
    [
        ("hostname", 0, f"{HOST.hostname}\n"),
        ("/bin/hostname; whoami", 0, f"{HOST.hostname}\nroot\n"),
        ('echo \'a  b\' "c\\"d" e\\ f', 0, 'a  b c"d e f\n'),
        ("false && echo no", 1, ""),
        ("false || echo yes", 0, "yes\n"),
        ("true && echo yes; echo $?", 0, "yes\n0\n"),
        ("false; echo $?", 0, "1\n"),
        ("sh -c 'echo inner; exit 3'", 3, "inner\n"),
        ("LC_ALL=C exec nvidia-smi -L >", 2, ""),
        ("seq 3", 0, "1\n2\n3\n"),
        ("[ a = b ] || echo differs", 0, "differs\n"),
        ("command -v nvidia-smi", 0, "/usr/bin/nvidia-smi\n"),
        ("exit 300", 300 & 0xFF, ""),
        ("", 0, ""),
    ],
)
async def test_commands(text: str, status: int, out: str) -> None:
    assert (await run(text))[:2] == (status, out)


async def test_what_is_not_there_is_not_found_and_nothing_is_run() -> None:
    assert await run("rm -rf /") == (127, "", "sh: 1: rm: not found\n")
    assert (await run("echo `id`"))[0] == 2
    assert (await run("echo 'open"))[0] == 2
    assert (await run("x" * 70_000))[0] == 126


async def test_cat_gives_back_its_input() -> None:
    assert await run("cat", b"one", b"two") == (0, "onetwo", "")
    assert (await run("cat /etc/passwd"))[0] == 1


async def test_stderr_can_be_joined_to_stdout() -> None:
    assert await run("strange 2>&1") == (127, "sh: 1: strange: not found\n", "")


async def test_the_shell_of_a_session_runs_line_after_line() -> None:
    status, out, _ = await run(SHELL_COMMAND, b"echo a; false; echo $?\n", b"\nech", b"o b\nkill\n")
    lines = [line for line in out.splitlines() if line != READY_LINE.decode()]
    assert (status, lines[:2]) == (0, ["a", "1"])
    assert out.startswith(f"{READY_LINE.decode()}\na\n1\n{READY_LINE.decode()}\n")
    assert out.endswith(f"{READY_LINE.decode()}\n")


async def test_a_hung_command_line_of_a_session_can_be_killed_and_ends_with_the_input() -> None:
    hang = Faults(nvidia_smi=SmiMode.HANG)
    async with asyncio.timeout(20):
        status, out, _ = await run(SHELL_COMMAND, b"nvidia-smi\n", b"kill\n", b"nvidia-smi\n", faults=hang)
    assert (status, out) == (0, f"{READY_LINE.decode()}\n" * 2)


async def probe(faults: Faults | None = None) -> object:
    async def execute(argv: Sequence[str], *, timeout_s: float, limit_bytes: int = 1 << 20) -> ExecResult:
        terminal = Terminal()
        async with asyncio.timeout(timeout_s):
            status = await shell(faults).run(shlex.join(argv), terminal)
        return ExecResult(status, terminal.out[:limit_bytes], terminal.err[:limit_bytes])

    return await probe_gpus(run_directly(execute), timeout_s=10.0)


async def test_gpumeshs_own_probe_understands_it() -> None:
    report = await probe()
    assert [gpu.uuid for gpu in report.gpus] == [gpu.uuid for gpu in HOST.gpus]  # type: ignore[attr-defined]
    assert report.hostname == HOST.hostname  # type: ignore[attr-defined]
    assert report.error is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", [mode for mode in SmiMode if mode is not SmiMode.HANG])
async def test_every_failure_of_nvidia_smi_is_a_report_and_never_a_crash(mode: SmiMode) -> None:
    report = await probe(Faults(nvidia_smi=mode))
    assert report.hostname == HOST.hostname  # type: ignore[attr-defined]
    shown = repr(report)
    assert "\\x1b" not in shown
    assert "\x1b" not in shown
