"""The guard of a pool's programs, in real shells: no program outlives the pool, however the pool ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.pools.hosts.guard_script import guarded_argv
from gpumesh.pools.hosts.guarded_program import GuardedProgram, run_guarded
from tests.pools.hosts.local_route import LocalRoute, local_route
from tests.tunnels.polling import alive, wait_until

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]
LIMIT_S = 0.4
KILL_AFTER_S = 0.2
# A program with a child, which says when both run.
FAMILY = ("sh", "-c", "sleep 600 & echo ready; wait")


def shell_argv(shell: str) -> tuple[str, ...]:
    path = shutil.which(shell)
    assert path is not None
    return (path, "sh") if shell == "busybox" else (path,)


def link_programs(folder: Path, shell: str, *names: str) -> Path:
    """A folder that is the whole PATH of a host with this shell. A host with busybox has nothing else."""
    folder.mkdir()
    for name in ("sh", *names):
        path = shutil.which("busybox" if shell == "busybox" else shell if name == "sh" else name)
        assert path is not None, name
        (folder / name).symlink_to(path)
    return folder


class Host:
    """A host whose processes are known by a variable in their environment."""

    def __init__(self, route: LocalRoute, mark: str) -> None:
        self.route = route
        self._mark = f"GPUMESH_TEST_HOST={mark}".encode()

    def processes(self) -> list[int]:
        """The processes of this host that run, among them those of the guard."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                is_ours = self._mark in (entry / "environ").read_bytes()
                is_zombie = ") Z " in (entry / "stat").read_text()
            except OSError:
                continue
            if is_ours and not is_zombie:
                found.append(int(entry.name))
        return found

    async def wait_empty(self) -> None:
        await wait_until(lambda: not self.processes(), "the end of all processes")


@pytest.fixture(params=SHELLS)
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Host]:
    path = link_programs(tmp_path / "bin", request.param, "sleep", "setsid", "pkill")
    async with open_host(shell_argv(request.param), path) as host:
        yield host


@contextlib.asynccontextmanager
async def open_host(shell: tuple[str, ...], path: Path | None = None) -> AsyncIterator[Host]:
    mark = uuid.uuid4().hex
    environment = dict(os.environ, GPUMESH_TEST_HOST=mark)
    if path is not None:
        environment["PATH"] = str(path)
    async with local_route(shell, environment) as route:
        host = Host(route, mark)
        try:
            yield host
        finally:
            for pid in host.processes():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)


async def first_line(program: GuardedProgram) -> str:
    async for line in program.lines():
        return line
    raise AssertionError(f"no line: {program.end}")


async def test_the_programs_status_and_output_come_through(host: Host) -> None:
    script = "echo out; echo err >&2; sleep 0.02; printf '...'; sleep 0.05; echo '..'; printf last; exit 7"
    async with run_guarded(host.route, ("sh", "-c", script)) as program:
        lines = [line async for line in program.lines()]
    assert sorted(lines[:2]) == ["err", "out"]
    assert lines[2:] == ["...", "..", "last"]
    assert program.end is not None
    assert program.end.exit_status == 7
    assert set(program.end.last_lines) == {"out", "err", "last"}
    assert str(program.end) == "ended with status 7"
    await host.wait_empty()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("sh", "-c", "kill -9 $$"), "was ended by SIGKILL"),
        (("sh", "-c", "kill -6 $$"), "was ended by SIGABRT"),
        (("/nowhere/llama-server",), "cannot be started: there is no such program"),
        (("/etc/passwd",), "cannot be started: the file may not be executed, or is for another kind of machine"),
    ],
)
async def test_an_end_is_described(argv: tuple[str, ...], text: str) -> None:
    async with open_host(("sh",)) as host, run_guarded(host.route, argv) as program:
        assert str(await program.wait_ended()) == text


async def test_the_end_of_the_block_ends_the_program_with_all_its_children(host: Host) -> None:
    async with run_guarded(host.route, FAMILY) as program:
        assert await first_line(program) == "ready"
        assert len(host.processes()) >= 3
    assert program.end is not None, "the block ends after the program"
    assert str(program.end) == "was ended by SIGTERM"
    await host.wait_empty()


async def test_a_program_that_ignores_sigterm_is_killed(host: Host) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 600; done"
    async with run_guarded(host.route, ("sh", "-c", script), kill_after_s=KILL_AFTER_S) as program:
        await first_line(program)
    assert str(program.end) == "was ended by SIGKILL"
    await host.wait_empty()


async def test_children_of_a_program_that_has_ended_are_killed(host: Host) -> None:
    async with run_guarded(host.route, ("sh", "-c", "sleep 600 & exit 3")) as program:
        assert (await program.wait_ended()).exit_status == 3
        await host.wait_empty()


async def test_the_end_of_the_input_ends_the_program(host: Host) -> None:
    async with run_guarded(host.route, FAMILY, kill_after_s=KILL_AFTER_S) as program:
        await first_line(program)
        await host.route.streams[0].close()  # as sshd does when the connection breaks
        await program.wait_ended()
        await host.wait_empty()


async def test_without_heartbeats_the_program_ends(host: Host) -> None:
    async with run_guarded(host.route, FAMILY, limit_s=LIMIT_S, heartbeat_s=600, kill_after_s=KILL_AFTER_S) as program:
        await first_line(program)
        await program.wait_ended()  # the input is open all the time
        await host.wait_empty()


async def test_with_heartbeats_the_program_runs_on(host: Host) -> None:
    script = "i=0; while [ $i -lt 8 ]; do sleep 0.1; i=$((i+1)); done; exit 5"
    async with run_guarded(host.route, ("sh", "-c", script), limit_s=LIMIT_S, heartbeat_s=0.05) as program:
        assert (await program.wait_ended()).exit_status == 5


async def test_when_the_guard_itself_is_killed_the_end_of_the_input_still_ends_the_program(host: Host) -> None:
    async with run_guarded(host.route, FAMILY, kill_after_s=KILL_AFTER_S) as program:
        await first_line(program)
        process = host.route.streams[0].process
        await wait_until(lambda: len(host.processes()) >= 7, "the start of the guard's own processes")
        os.killpg(process.pid, signal.SIGKILL)
        await wait_until(lambda: not alive(process.pid), "the end of the guard")
        assert len(host.processes()) >= 3, "the program runs on"
        await host.route.streams[0].close()  # as sshd does when its child has ended
        await host.wait_empty()


async def test_when_our_process_is_killed_the_program_ends(host: Host, tmp_path: Path) -> None:
    argv = (*host.route.shell, *guarded_argv(FAMILY, kill_after_s=KILL_AFTER_S)[1:])
    script = f"import subprocess, time; subprocess.Popen({argv!r}, stdin=subprocess.PIPE); time.sleep(600)"
    with subprocess.Popen((sys.executable, "-c", script), stdout=subprocess.PIPE, env=host.route.environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
    await host.wait_empty()


@pytest.mark.parametrize("shell", SHELLS)
async def test_a_host_without_setsid(shell: str, tmp_path: Path) -> None:
    path = link_programs(tmp_path / "bin", shell, "sleep", "pkill")
    async with open_host(shell_argv(shell), path) as host:
        timing = {"limit_s": LIMIT_S, "heartbeat_s": 0.05, "kill_after_s": KILL_AFTER_S}
        async with run_guarded(host.route, FAMILY, **timing) as program:
            assert await first_line(program) == "ready"
        await host.wait_empty()
        async with run_guarded(host.route, FAMILY, limit_s=LIMIT_S, heartbeat_s=600, kill_after_s=0.1) as program:
            await first_line(program)
            await program.wait_ended()
            await host.wait_empty()


def test_csh_can_start_the_script() -> None:
    for argument in guarded_argv(("llama-server",)):
        assert "\n" not in argument
        assert "'" not in argument
        assert all(character == " " for _, _, after in [argument.partition("!")] for character in after[:1])
