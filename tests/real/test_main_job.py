"""The main job through real parts: two hosts behind OpenSSH's sshd with real inference, by the installed command."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from tests.prerequisites import needs
from tests.real.command import Gpumesh, write_config
from tests.real.conftest import Backends
from tests.real.hosts import DRIVER, GPU, UTILIZATION_PCT, VRAM_MIB, LlamaServer, RealHost, hosts
from tests.status_schema import check_status_document
from tests.tunnels.polling import wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(180), needs("sshd", "llama-server")]


def valid(document: Any) -> Any:
    check_status_document(document)
    return document


def check_nodes(status: Any, two_hosts: list[RealHost], model: str) -> None:
    for node, host in zip(status["nodes"], two_hosts, strict=True):
        assert (node["name"], node["health"], node["reason"]) == (host.name, "healthy", None), node
        assert node["tunnel"]["transport"] == "sshtunnel"
        assert node["tunnel"]["state"] == "up"
        assert node["host"]["driver"] == DRIVER
        (gpu,) = node["gpus"]
        assert (gpu["name"], gpu["uuid"]) == (GPU, host.uuid)
        assert gpu["memory_total_mib"] == VRAM_MIB
        assert gpu["utilization_pct"] == UTILIZATION_PCT
        assert gpu["power_w"] == 62.5
        assert gpu["fan_pct"] is None, "nvidia-smi said [N/A]: unknown is null, never 0"
        assert model in node["backend"]["models"]
    assert status["totals"]["gpus"] == 2
    assert status["totals"]["vram_total_mib"] == 2 * VRAM_MIB


async def test_up_status_run_down(
    gpumesh: Gpumesh, two_hosts: list[RealHost], backends: Backends, tmp_path: Path
) -> None:
    await gpumesh("up", "-d")
    status = valid((await gpumesh("status", "--json")).json())
    check_nodes(status, two_hosts, backends.model)
    assert status["gateway"]["state"] == "serving"
    ports = {node["tunnel"]["local_port"] for node in status["nodes"]}
    ports.add(int(status["gateway"]["url"].rpartition(":")[2]))
    assert ports <= gpumesh.listening()
    (socket,) = [path for path in gpumesh.sockets() if path.is_socket()]
    assert socket.stat().st_mode & 0o777 == 0o600

    answer = await gpumesh("run", "Hello", "-o", "num_predict=12")
    assert answer.out.strip()

    prompts = [f"Prompt number {number}" for number in range(100)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    results = (await gpumesh("run", "-f", str(tmp_path / "prompts.txt"), "-o", "num_predict=8")).lines()
    assert [result["index"] for result in results] == list(range(100))
    assert [result["prompt"] for result in results] == prompts
    assert [result["error"] for result in results] == [None] * 100
    assert all(result["response"] and result["tokens"] == 8 for result in results)
    shares = [sum(result["node"] == host.name for result in results) for host in two_hosts]
    assert sum(shares) == 100
    assert min(shares) >= 10, f"both nodes work: {shares}"

    status = valid((await gpumesh("status", "--json")).json())
    assert sum(node["load"]["served"] for node in status["nodes"]) == 101
    assert status["gateway"]["in_flight"] == 0

    again = await gpumesh("up", "-d", code=1)
    assert "already" in again.err or "runs" in again.err
    assert gpumesh.processes()
    await gpumesh("down")
    assert gpumesh.processes() == set()
    assert gpumesh.sockets() == []
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
    for host in two_hosts:
        await wait_until(lambda host=host: not host.sshd.children(), "sshd's sessions ended")  # type: ignore[misc]
    assert "no mesh is running" in (await gpumesh("down")).err


async def test_without_a_running_mesh(gpumesh: Gpumesh, two_hosts: list[RealHost], backends: Backends) -> None:
    """``status`` and ``run`` open a mesh of their own, and close it."""
    gpumesh = replace(gpumesh, warm=True)  # test_one_node_ill.py does this with the installed script
    status = valid((await gpumesh("status", "--json")).json())
    check_nodes(status, two_hosts, backends.model)
    none = {"url": None, "state": "off", "in_flight": 0, "queued": 0}
    assert {key: status["gateway"][key] for key in none} == none
    assert gpumesh.processes() == set()
    answer = (await gpumesh("run", "--json", "-o", "num_predict=5", stdin="from stdin")).json()
    assert answer["prompt"] == "from stdin"
    assert answer["tokens"] == 5
    assert answer["tokens_per_s"] > 0
    assert gpumesh.processes() == set()
    assert (await gpumesh("status", "--check", "--quiet", code=None)).code in (0, 3)
    table = (await gpumesh("status")).out
    assert "alpha" in table
    assert "4090" in table


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("detached", [True, False])
async def test_run_streams_and_its_end_stops_the_generation(
    alone: Gpumesh, tiny_model: Path, tmp_path: Path, detached: bool, ending: signal.Signals
) -> None:
    alone = replace(alone, warm=not detached)
    async with LlamaServer(tiny_model, context=60_000) as server, hosts(tmp_path, [server.backend()]) as made:
        write_config(alone.config, [made[0].node()], model="tiny")
        if detached:
            await alone("up", "-d")
        async with alone.started("run", "Tell a very long story", "-o", "num_predict=50000") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            async with asyncio.timeout(30):
                first = await process.stdout.read(16)
            assert first
            assert await server.busy() == 1, "the text came while the rest was still being generated"
            process.send_signal(ending)
            async with asyncio.timeout(30):
                await process.stdout.read()
                errors = await process.stderr.read()
                assert await process.wait() == (130 if ending is signal.SIGINT else -signal.SIGKILL)
            assert b"Traceback" not in errors
        async with asyncio.timeout(20):
            while await server.busy():
                await asyncio.sleep(0.05)
        if detached:
            status = valid((await alone("status", "--json")).json())
            assert status["gateway"]["in_flight"] == 0
            assert status["nodes"][0]["load"]["in_flight"] == 0
            await alone("down")
        await wait_until(lambda: not alone.processes(), "all ended")


async def test_up_in_the_foreground_ends_with_ctrl_c_and_leaves_nothing(
    gpumesh: Gpumesh, two_hosts: list[RealHost]
) -> None:
    """On a terminal, whose Ctrl-C reaches all processes on it at once: a live table, then nothing."""
    async with gpumesh.terminal("up") as terminal:
        for host in two_hosts:
            await terminal.wait_for_text(host.name)
        await terminal.wait_for_text("4090")
        again = await gpumesh("up", code=1)
        assert "already" in again.err
        answer = (await gpumesh("run", "--json", "-o", "num_predict=5", "Hello")).json()
        assert answer["error"] is None, "the other commands use it while it runs"
        terminal.press("\x03")
        assert await terminal.wait_exit() == 0
    assert "Traceback" not in terminal.written
    await nothing_left(gpumesh, two_hosts)


async def test_a_second_ctrl_c_does_not_wait_for_what_is_in_flight(
    gpumesh: Gpumesh, two_hosts: list[RealHost], backends: Backends
) -> None:
    async with gpumesh.started("up") as up:
        assert up.stdout is not None
        async with asyncio.timeout(30):
            assert await up.stdout.readline(), "its first report"
        async with gpumesh.started("run", "A long story", "-o", "num_predict=1900") as process:
            assert process.stdout is not None
            async with asyncio.timeout(30):
                assert await process.stdout.read(16)
            up.send_signal(signal.SIGINT)
            up.send_signal(signal.SIGINT)
            async with asyncio.timeout(30):
                _, err = await up.communicate()
        assert up.returncode in (0, 130), err
        assert b"Traceback" not in err
    await nothing_left(gpumesh, two_hosts)


async def test_a_mesh_that_is_killed_leaves_no_workers_and_is_no_obstacle(
    gpumesh: Gpumesh, two_hosts: list[RealHost], backends: Backends
) -> None:
    gpumesh = replace(gpumesh, warm=True)
    await gpumesh("up", "-d")
    assert len(gpumesh.processes()) > 1, "a process for each tunnel"
    os.kill(gpumesh.leader(), signal.SIGKILL)
    await wait_until(lambda: not gpumesh.processes(), "its workers ended with it")
    for host in two_hosts:
        await wait_until(lambda host=host: not host.sshd.children(), "sshd's sessions ended")  # type: ignore[misc]
    check_nodes(valid((await gpumesh("status", "--json")).json()), two_hosts, backends.model)
    await gpumesh("up", "-d")
    check_nodes(valid((await gpumesh("status", "--json")).json()), two_hosts, backends.model)
    await gpumesh("down")
    await nothing_left(gpumesh, two_hosts)


async def nothing_left(gpumesh: Gpumesh, two_hosts: list[RealHost]) -> None:
    await wait_until(lambda: not gpumesh.processes(), "all its processes ended")
    assert gpumesh.sockets() == []
    for host in two_hosts:
        await wait_until(lambda host=host: not host.sshd.children(), "sshd's sessions ended")  # type: ignore[misc]


HOSTILE = "NVIDIA\x1b]0;owned\x07 \x1b[2J\x1b[1;1H\x1b[31mGeForce\u009b5m RTX\u202e 4090\x1b[?1049h"
OURS = re.compile(r"\x1b\[[0-9;]*m")  # colours, which are all that a table is written with


async def test_a_gpus_name_does_nothing_to_the_terminal(gpumesh: Gpumesh, two_hosts: list[RealHost]) -> None:
    gpumesh = replace(gpumesh, warm=True)  # what they write is the same, and they start more quickly
    two_hosts[0].set_gpu_name(HOSTILE)
    for arguments in (["status"], ["status", "--verbose"], ["audit"], ["models", "list"]):
        written = await gpumesh.run_on_terminal(*arguments)
        rest = OURS.sub("", written)
        bad = [character for character in rest if not character.isprintable() and character not in "\r\n"]
        assert bad == [], arguments
    written = await gpumesh.run_on_terminal("exec", "alpha", "--", "nvidia-smi", "--query-gpu=name")
    assert "GeForce" in written
    assert "\x1b" not in OURS.sub("", written)
    async with gpumesh.terminal("up") as terminal:
        await terminal.wait_for_text("4090")
        await terminal.wait_for_text("beta")
        terminal.press("\x03")
        await terminal.wait_exit()
    for sequence in ("\x1b]0;owned", "\x1b[2J\x1b[1;1H\x1b[31mG", "\u009b", "\u202e", "\x07"):
        assert sequence not in terminal.written
    (gpu,) = (await gpumesh("status", "--json")).json()["nodes"][0]["gpus"]
    assert gpu["name"] == GPU


@pytest.mark.exclusive
async def test_bench_agrees_with_the_set_rate(alone: Gpumesh, tmp_path: Path) -> None:
    """Through a real sshd, from a stand-in whose rate is exact: within 3 %."""
    alone = replace(alone, warm=True)
    rates = (100.0, 60.0)
    async with (
        SimOllama(profile.make_host("one", tokens_per_s=rates[0], load_s=0.0)) as one,
        SimOllama(profile.make_host("two", tokens_per_s=rates[1], load_s=0.0)) as two,
        hosts(tmp_path, [{"kind": "ollama", "port": one.port}, {"kind": "ollama", "port": two.port}]) as made,
    ):
        write_config(alone.config, [host.node() for host in made], model="qwen2.5:7b")
        result = (await alone("bench", "run", "--json", "-n", "3", "--tokens", "64", "--out", "result")).json()
    for host, rate in zip(made, rates, strict=True):
        (stage,) = [stage for stage in result["stages"] if stage["node"] == host.name and stage["kind"] == "node"]
        assert stage["failed"] == 0
        for clock in ("server", "wall"):
            assert stage["rates"][clock]["p50"] == pytest.approx(rate, rel=0.03), clock
        assert stage["latency"]["ttft"]["p50"] > 0
    files = sorted(path.name for path in (alone.home / "result").iterdir())
    assert files == ["report.html", "requests.jsonl", "result.json"]
