"""Questions to this machine that all of its nodes share: with real commands and a fake /proc."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest

from gpumesh.tunnels.direct.port_owners import HostPort, PortOwner, PortOwnerLookup
from gpumesh.tunnels.direct.this_machine import MAX_AGE_S, ThisMachine
from tests.tunnels.direct.test_port_owners import FakeProc
from tests.tunnels.polling import alive, wait_until


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def read_log(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


async def test_a_shared_command_runs_once_for_all_callers(tmp_path: Path) -> None:
    clock, log = Clock(), tmp_path / "log"
    machine = ThisMachine(clock=clock)
    command = ("sh", "-c", f"echo asked >> {log}; echo answer; exit 3")

    async def ask(argv: tuple[str, ...] = command) -> tuple[int | None, bytes]:
        answer = await machine.run_shared_command(argv, timeout_s=20, limit_bytes=100)
        return answer.exit_status, answer.stdout

    assert set(await asyncio.gather(*(ask() for _ in range(20)))) == {(3, b"answer\n")}
    assert read_log(log) == ["asked"]
    clock.now = MAX_AGE_S / 2
    await ask()
    assert read_log(log) == ["asked"], "the answer is new enough"
    assert await ask(("sh", "-c", "echo another")) == (0, b"another\n")
    clock.now = MAX_AGE_S * 1.01
    await ask()
    assert read_log(log) == ["asked"] * 2


async def test_a_shared_command_that_failed_runs_again(tmp_path: Path) -> None:
    machine, program = ThisMachine(), tmp_path / "program"
    with pytest.raises(FileNotFoundError):
        await machine.run_shared_command([str(program)], timeout_s=20, limit_bytes=100)
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    assert (await machine.run_shared_command([str(program)], timeout_s=20, limit_bytes=100)).stdout == b"here\n"
    with pytest.raises(TimeoutError):
        await machine.run_shared_command(["sleep", "600"], timeout_s=0.1, limit_bytes=100)


async def test_a_shared_command_ends_with_its_last_caller(tmp_path: Path) -> None:
    machine, log = ThisMachine(), tmp_path / "log"
    command = ("sh", "-c", f"echo $$ > {log}; exec sleep 600")
    first, second = (
        asyncio.create_task(machine.run_shared_command(command, timeout_s=600, limit_bytes=9)) for _ in range(2)
    )
    await wait_until(lambda: bool(read_log(log)), "the command's start")
    pid = int(read_log(log)[0])
    first.cancel()
    await asyncio.wait([first])
    assert alive(pid), "another caller waits for it"
    second.cancel()
    await asyncio.wait([second])
    assert not alive(pid)
    assert (await machine.run_shared_command(("echo", "on"), timeout_s=20, limit_bytes=9)).stdout == b"on\n"


class CountingLookup(PortOwnerLookup):
    calls = 0

    def find_owners(self, addresses: Collection[HostPort]) -> dict[HostPort, PortOwner]:
        self.calls += 1
        return super().find_owners(addresses)


async def test_port_owners_are_looked_up_once_for_all_nodes(tmp_path: Path) -> None:
    proc, clock = FakeProc(tmp_path / "proc"), Clock()
    for port in range(11434, 11444):
        proc.listen("127.0.0.1", port, port)
    proc.process(42, "ollama", "ollama", "serve", inodes=tuple(range(11434, 11443)))
    proc.process(43, "ssh", "ssh", "-L", "x", inodes=(11443,))
    ports = CountingLookup(proc=proc.folder, platform="linux", list_sockets=proc.list_sockets)
    machine = ThisMachine(ports, clock=clock)
    for port in range(11434, 11444):
        machine.register_port("127.0.0.1", port)
    owners = await asyncio.gather(*(machine.find_owner("127.0.0.1", port) for port in range(11434, 11444)))
    assert owners == [PortOwner(True)] * 9 + [
        PortOwner(False, "ssh listens on port 11443, which may lead to another machine")
    ]
    assert ports.calls == 1
    proc.listen("127.0.0.1", 8080, 77)
    proc.process(44, "ollama", "ollama", "serve", inodes=(77,))
    assert (await machine.find_owner("127.0.0.1", 8080)).is_local, "a place that is new is calls for at once"
    assert ports.calls == 2
    assert not (await machine.find_owner("127.0.0.1", 11443)).is_local
    assert ports.calls == 2
    clock.now = MAX_AGE_S * 1.01
    assert (await machine.find_owner("127.0.0.1", 11434)).is_local
    assert ports.calls == 3
