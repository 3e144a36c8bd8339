"""What is asked of this machine once for all of its nodes: with real commands and a real /proc."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest

from gpumesh.tunnels.direct.port_owners import HostPort, PortOwner, PortOwnerLookup
from gpumesh.tunnels.direct.this_machine import MAX_AGE_S, ThisMachine
from tests.tunnels.direct.test_port_owners import MadeUp
from tests.tunnels.polling import alive, wait_until


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


async def test_a_question_of_many_is_asked_once(tmp_path: Path) -> None:
    clock, log = Clock(), tmp_path / "log"
    here = ThisMachine(clock=clock)
    command = ("sh", "-c", f"echo asked >> {log}; echo answer; exit 3")

    async def ask(argv: tuple[str, ...] = command) -> tuple[int | None, bytes]:
        answer = await here.run_shared_command(argv, timeout_s=20, limit_bytes=100)
        return answer.exit_status, answer.stdout

    assert set(await asyncio.gather(*(ask() for _ in range(20)))) == {(3, b"answer\n")}
    assert told(log) == ["asked"]
    clock.now = MAX_AGE_S / 2
    await ask()
    assert told(log) == ["asked"], "so old an answer will do"
    assert await ask(("sh", "-c", "echo another")) == (0, b"another\n")
    clock.now = MAX_AGE_S * 1.01
    await ask()
    assert told(log) == ["asked"] * 2


async def test_a_question_that_fails_is_asked_again(tmp_path: Path) -> None:
    here, program = ThisMachine(), tmp_path / "program"
    with pytest.raises(FileNotFoundError):
        await here.run_shared_command([str(program)], timeout_s=20, limit_bytes=100)
    program.write_text("#!/bin/sh\necho here\n")
    program.chmod(0o755)
    assert (await here.run_shared_command([str(program)], timeout_s=20, limit_bytes=100)).stdout == b"here\n"
    with pytest.raises(TimeoutError):
        await here.run_shared_command(["sleep", "600"], timeout_s=0.1, limit_bytes=100)


async def test_it_ends_with_the_last_who_waits(tmp_path: Path) -> None:
    here, log = ThisMachine(), tmp_path / "log"
    command = ("sh", "-c", f"echo $$ > {log}; exec sleep 600")
    first, second = (
        asyncio.create_task(here.run_shared_command(command, timeout_s=600, limit_bytes=9)) for _ in range(2)
    )
    await wait_until(lambda: bool(told(log)), "the command's start")
    pid = int(told(log)[0])
    first.cancel()
    await asyncio.wait([first])
    assert alive(pid), "somebody else waits for it"
    second.cancel()
    await asyncio.wait([second])
    assert not alive(pid)
    assert (await here.run_shared_command(("echo", "on"), timeout_s=20, limit_bytes=9)).stdout == b"on\n"


class Counting(PortOwnerLookup):
    looked = 0

    def find_owners(self, places: Collection[HostPort]) -> dict[HostPort, PortOwner]:
        self.looked += 1
        return super().find_owners(places)


async def test_who_listens_is_looked_up_once_for_all(tmp_path: Path) -> None:
    proc, clock = MadeUp(tmp_path / "proc"), Clock()
    for port in range(11434, 11444):
        proc.listen("127.0.0.1", port, port)
    proc.process(42, "ollama", "ollama", "serve", inodes=tuple(range(11434, 11443)))
    proc.process(43, "ssh", "ssh", "-L", "x", inodes=(11443,))
    ports = Counting(proc=proc.folder, platform="linux")
    here = ThisMachine(ports, clock=clock)
    for port in range(11434, 11444):
        here.register_port("127.0.0.1", port)
    owners = await asyncio.gather(*(here.find_owner("127.0.0.1", port) for port in range(11434, 11444)))
    assert owners == [PortOwner(True)] * 9 + [
        PortOwner(False, "ssh listens on port 11443, which may lead to another machine")
    ]
    assert ports.looked == 1
    proc.listen("127.0.0.1", 8080, 77)
    proc.process(44, "ollama", "ollama", "serve", inodes=(77,))
    assert (await here.find_owner("127.0.0.1", 8080)).is_local, "a place that is new is looked for at once"
    assert ports.looked == 2
    assert not (await here.find_owner("127.0.0.1", 11443)).is_local
    assert ports.looked == 2
    clock.now = MAX_AGE_S * 1.01
    assert (await here.find_owner("127.0.0.1", 11434)).is_local
    assert ports.looked == 3
