"""Programs with an input, over both transports against a real sshd, and on this machine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.config import environment
from gpumesh.errors import ExecError, TunnelDown
from gpumesh.topology import BackendSpec, NodeSpec, Target, TransportKind
from gpumesh.tunnels.base import OutputStream, ProgramStream
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from gpumesh.tunnels.workers.worker_link import PROGRAM_WINDOW_BYTES
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd
from tests.tunnels.supervised import LONG_S, both, supervised, wait_reconnects

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]

# A guard as pools have it: prints its own pid and its program's, answers each line, and ends its program, which has a
# process group of its own, when its input ends.
GUARD = (
    "setsid sh -c 'sleep 600 & wait' & p=$!; echo $$ $p; "
    'while read -r line; do echo "got $line"; done; { kill -9 -$p || kill -9 $p -$p; } 2>/dev/null; exit 3'
)


async def read_line(program: ProgramStream) -> bytes:
    return (await read_lines(program, 1))[0]


async def read_lines(program: ProgramStream, count: int) -> list[bytes]:
    """Exactly ``count`` lines. More must not have come."""
    output = b""
    async with asyncio.timeout(20):
        while output.count(b"\n") < count:
            chunk = await program.read()
            assert not chunk.ended, output
            output += chunk.data
    lines = output.splitlines()
    assert len(lines) == count, lines
    return lines


async def read_to_end(program: ProgramStream) -> None:
    while not (await program.read()).ended:
        pass


async def start_guard(opening: object) -> tuple[ProgramStream, list[int]]:
    program: ProgramStream = await opening  # type: ignore[misc]
    return program, [int(pid) for pid in (await read_line(program)).split()]


async def wait_dead(pids: list[int]) -> None:
    await wait_until(lambda: not any(map(alive, pids)), f"the end of {pids}")


def direct(host: str = "127.0.0.1") -> DirectTunnel:
    """A tunnel that is not up."""
    return DirectTunnel(NodeSpec("here", BackendSpec(targets=(Target(host, 1),))), on_change=lambda _: None)


@both
async def test_it_answers_its_input_and_ends_with_it(sshd: Sshd, pool: WorkerPool, transport: TransportKind) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched:
        with pytest.raises(TunnelDown):
            await watched.tunnel.open_program(["cat"])
        await watched.tunnel.wait_up()
        program = await watched.tunnel.open_program(["sh", "-c", GUARD])
        await program.write(b"one ' \xff\n")  # at once: input does not have to wait for the start
        pids, answer = await read_lines(program, 2)
        assert answer == b"got one ' \xff"
        await program.write(b"two\n")
        assert await read_line(program) == b"got two"
        await program.close()
        await wait_dead([int(pid) for pid in pids.split()])
        with pytest.raises(ExecError):
            await program.read()
        program = await watched.tunnel.open_program(["sh", "-c", "echo no >&2; exit 4"])
        chunks = [await program.read()]
        while not chunks[-1].ended:
            chunks.append(await program.read())
        assert b"".join(chunk.data for chunk in chunks if chunk.stream is OutputStream.STDERR) == b"no\n"
        assert (await program.read()).exit_status == 4
        await program.write(b"dropped")
        await program.close()
        await program.close()


@both
async def test_close_and_the_end_of_the_connection_end_it(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched:
        await watched.tunnel.wait_up()
        program, pids = await start_guard(watched.tunnel.open_program(["sh", "-c", GUARD]))
        await program.close()
        await wait_dead(pids)
        program, pids = await start_guard(watched.tunnel.open_program(["sh", "-c", GUARD]))
        with watched.tunnel.held_closed():
            with pytest.raises(ExecError, match="cut off"):
                await asyncio.wait_for(program.read(), 20)
            with pytest.raises(TunnelDown):
                await program.write(b"lost\n")
            await wait_dead(pids)
        await wait_reconnects(watched, 1)
        program, pids = await start_guard(watched.tunnel.open_program(["sh", "-c", GUARD]))
    await wait_dead(pids)


@both
async def test_output_that_is_not_read_stops_it(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind, tmp_path: Path
) -> None:
    size = 5 * PROGRAM_WINDOW_BYTES
    script = f"head -c {size} /dev/zero; echo > {tmp_path / 'printed'}; exec cat"
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched:
        await watched.tunnel.wait_up()
        program = await watched.tunnel.open_program(["sh", "-c", script])
        received = len((await program.read()).data)
        pending = program._pending  # type: ignore[attr-defined]
        await wait_until(lambda: pending.queued_bytes > PROGRAM_WINDOW_BYTES, "a full window")
        # Pings and commands go on meanwhile. After a few, more output would have come if nothing stopped it.
        for _ in range(5):
            assert (await watched.tunnel.exec(["true"], timeout_s=20)).exit_status == 0
        assert pending.queued_bytes <= PROGRAM_WINDOW_BYTES * 4 / 3 + 4096
        assert not (tmp_path / "printed").exists()
        async with asyncio.timeout(20):
            while received < size:
                received += len((await program.read()).data)
        await program.write(b"and more\n")
        assert await read_line(program) == b"and more"
        await program.close()


@both
async def test_input_that_is_not_read_makes_the_writer_wait(
    sshd: Sshd, pool: WorkerPool, transport: TransportKind
) -> None:
    async with supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched:
        await watched.tunnel.wait_up()
        program = await watched.tunnel.open_program(["sh", "-c", "while echo; do sleep 0.05; done"])
        writing = asyncio.create_task(program.write(bytes(16 << 20)))
        for _ in range(5):
            assert (await watched.tunnel.exec(["true"], timeout_s=20)).exit_status == 0
        assert not writing.done()
        await program.close()
        await asyncio.wait_for(writing, 20)


@both
async def test_a_host_with_one_session_does_not_end_it_for_a_command(
    tmp_path: Path, pool: WorkerPool, transport: TransportKind
) -> None:
    options = {"MaxSessions": "1", "LogLevel": "INFO"}
    async with (
        Sshd(tmp_path / "sshd", options) as sshd,
        supervised(pool, sshd.spec(transport=transport, keepalive_s=LONG_S), 1) as watched,
    ):
        await watched.tunnel.wait_up()
        if transport is TransportKind.OPENSSH:  # whose own session is in the way of the first program: it reconnects
            refused = await watched.tunnel.open_program(["cat"])
            with pytest.raises(ExecError, match="session"):
                await read_to_end(refused)
            await wait_reconnects(watched, 1)
        program = await watched.tunnel.open_program(["cat"])
        await program.write(b"one\n")
        assert await read_line(program) == b"one"
        with pytest.raises(ExecError):
            await watched.tunnel.exec(["true"], timeout_s=20)
        await program.write(b"two\n")
        assert await read_line(program) == b"two"
        await program.close()


# -- on this machine -------------------------------------------------------------------------------------------------


async def test_a_program_on_this_machine() -> None:
    tunnel = direct()
    program, pids = await start_guard(tunnel.open_program(["sh", "-c", GUARD]))
    await program.write(b"one\n")
    assert await read_line(program) == b"got one"
    reading = asyncio.create_task(program.read())
    await program.close()
    await wait_dead(pids)
    with pytest.raises(ExecError):
        await asyncio.wait_for(reading, 20)
    program = await tunnel.open_program(["sh", "-c", "echo no >&2; exit 4"])
    assert (await program.read()).data == b"no\n"
    for _ in range(2):
        assert (await asyncio.wait_for(program.read(), 20)).exit_status == 4
    await program.write(b"dropped")
    await program.close()
    with pytest.raises(ExecError, match="not installed"):
        await tunnel.open_program(["no-such-program"])


async def test_a_program_on_this_machine_that_ignores_the_end_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumesh.tunnels.direct.local_program.PROGRAM_END_S", 0.05)
    tunnel = direct()
    program = await tunnel.open_program(["sh", "-c", "sleep 600 & echo $$ $!; wait"])
    pids = [int(pid) for pid in (await read_line(program)).split()]
    await program.close()
    await wait_dead(pids)


async def test_output_on_this_machine_that_is_not_read_stops_the_program(tmp_path: Path) -> None:
    size = 4 << 20
    script = f"head -c {size} /dev/zero; echo > {tmp_path / 'printed'}; exec cat"
    tunnel = direct()
    program = await tunnel.open_program(["sh", "-c", script])
    received = len((await program.read()).data)
    await wait_until(program._pieces.full, "a full queue")  # type: ignore[attr-defined]
    await (await tunnel.open_program(["true"])).read()
    assert not (tmp_path / "printed").exists()
    async with asyncio.timeout(20):
        while received < size:
            received += len((await program.read()).data)
    await wait_until((tmp_path / "printed").exists, "the end of its output")
    await program.close()


async def test_a_node_on_another_machine_has_no_programs_here() -> None:
    tunnel = direct("192.0.2.1")
    with pytest.raises(ExecError, match="not on this machine"):
        await tunnel.open_program(["true"])


# -- a mesh that is killed -------------------------------------------------------------------------------------------

KILLED_MESH = """
import asyncio, pathlib, sys, time
from gpumesh.topology import BackendSpec, NodeSpec, SshSpec, Target, TransportKind
from gpumesh.tunnels.supervisor import open_tunnel, run_tunnel
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.tunnels.test_programs import GUARD

host, port, user, identity, known_hosts = sys.argv[1:]

async def main():
    async with WorkerPool() as pool, asyncio.TaskGroup() as group:
        for kind in (*TransportKind, None):
            ssh = kind and SshSpec(
                host=host, port=int(port), user=user, identity_files=(pathlib.Path(identity),),
                known_hosts=pathlib.Path(known_hosts), agent=False, transport=kind,
            )
            spec = NodeSpec(f"node-{kind}", BackendSpec(targets=(Target("127.0.0.1", 1),)), ssh)
            tunnel = open_tunnel(spec, workers=pool, on_change=lambda _: None)
            if kind:
                group.create_task(tunnel.run())
                await tunnel.wait_up()
            program = await tunnel.open_program(["sh", "-c", GUARD])
            print((await program.read()).data.decode(), end="", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_no_program_outlives_a_mesh_that_is_killed(sshd: Sshd, runtime: Path) -> None:
    ssh = sshd.spec()
    arguments = [ssh.host, str(ssh.port), ssh.user, str(ssh.identity_files[0]), str(ssh.known_hosts)]
    mesh = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED_MESH, *arguments,
        stdout=subprocess.PIPE, env=environment.child_environment({"XDG_RUNTIME_DIR": str(runtime)}),
    )  # fmt: skip
    assert mesh.stdout is not None
    pids: list[int] = []
    try:
        async with asyncio.timeout(40):
            while len(pids) < 6:
                pids += [int(pid) for pid in (await mesh.stdout.readline()).split()]
        assert all(map(alive, pids))
    finally:
        mesh.kill()
        await mesh.wait()
    await wait_dead(pids)
