"""`gpumesh bench` by the installed command, on hosts in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.lab.profile import Faults
from tests.cli.meshes import MODEL, SimulatedMesh, quick_host, simulated_mesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]

FILES = ["report.html", "requests.jsonl", "result.json"]
SOON = ("-n", "2", "--tokens", "3")


@pytest.fixture
async def two(gpumesh: Gpumesh) -> AsyncIterator[SimulatedMesh]:
    """Without SSH, which is not the subject."""
    async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False), quick_host("beta", ssh=False)) as made:
        yield made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_run_its_table_and_its_files(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    ended = await gpumesh("bench", "run", *SOON, "--out", "first")
    lines = ended.out.splitlines()
    assert lines[0].split()[:3] == ["STAGE", "IN", "FLIGHT"]
    assert [line.split()[0] for line in lines[2:5]] == ["alpha", "beta", "mesh"]
    assert any(line.startswith("scaling: mesh ") for line in lines)
    assert "simulated" in ended.err
    assert "first" in ended.err
    folder = gpumesh.home / "first"
    assert names(folder) == FILES
    # The same by `show`, and as JSON.
    assert (await gpumesh("bench", "show", "first")).out == ended.out
    shown = (await gpumesh("bench", "show", "first", "--json")).json()
    assert shown == json.loads((folder / "result.json").read_text())
    assert shown["schema"] == "gpumesh.bench/1"
    assert shown["settings"]["model"] == MODEL
    assert len((folder / "requests.jsonl").read_text().splitlines()) == 2 + 2 + 2 + 4
    # It is not written over unless that is asked for.
    refused = await gpumesh("bench", "run", *SOON, "--out", "first", code=2)
    assert "holds a result already" in refused.err
    assert json.loads((folder / "result.json").read_text()) == shown
    again = await gpumesh("bench", "run", *SOON, "--out", "first", "--force", "--quiet", "--json")
    assert again.err == ""
    assert again.json() == json.loads((folder / "result.json").read_text())
    assert again.json()["at"] != shown["at"]


async def test_on_a_running_mesh_and_without_a_place_for_it(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    assert "nothing was measured yet" in (await gpumesh("bench", "show", code=2)).err
    await gpumesh("up", "-d")
    ended = await gpumesh("bench", "run", "--scenario", "overhead", *SOON)
    assert "alpha via gateway" in ended.out
    assert "; gateway adds " in ended.out
    latest = (await gpumesh("bench", "show", "--json")).json()
    assert latest["scenario"] == "overhead"
    assert not latest["environment"]["embedded"]
    status = (await gpumesh("status", "--json")).json()
    assert sum(node["load"]["in_flight"] for node in status["nodes"]) == 0
    await gpumesh("down")


async def test_other_scenarios(two: SimulatedMesh, tmp_path: Path) -> None:
    gpumesh = two.gpumesh
    failover = await gpumesh("bench", "run", "--scenario", "failover", "-n", "20", "--tokens", "6", "--out", "f")
    starts = [line.partition(":")[0] for line in failover.out.splitlines()[3:11]]
    assert starts[0].endswith(", drained")
    assert starts[1:] == ["requests", "clients", "tokens of continued answers", "put back", "before", "during", "after"]
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:4{second}.6805900,{30 + second},2" for second in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    replay = await gpumesh(
        "bench", "run", "--scenario", "replay", "--trace", str(trace), "--speed", "50", "--out", "r", "--json"
    )
    (stage,) = replay.json()["stages"]
    assert (stage["concurrency"], stage["served"], stage["failed"]) == (None, 5, 0)
    sweep = await gpumesh("bench", "run", "--scenario", "sweep", "-c", "1,2", *SOON, "--out", "s", "--json")
    assert [stage["name"] for stage in sweep.json()["stages"]] == ["c=1", "c=2"]
    alone = await gpumesh("bench", "run", "--node", "beta", *SOON, "--out", "n", "--json")
    assert [stage["name"] for stage in alone.json()["stages"]] == ["beta", "mesh"]


async def test_each_way_to_a_server_and_a_server_of_no_mesh(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    for way in ("gateway", "direct", "mesh"):
        ended = await gpumesh("bench", "run", *SOON, "--via", way, "--out", way, "--json")
        found = ended.json()
        assert found["environment"]["via"] == way
        assert [stage["failed"] for stage in found["stages"]] == [0, 0, 0]
        conditions = found["stages"][-1]["conditions"]
        assert (conditions["via"], conditions["own_process"]) == (way, way != "mesh")
        assert {share["node"] for share in found["stages"][0]["nodes"]} == {"alpha"}, "pinned on each way"
    url = f"http://127.0.0.1:{two.hosts['alpha'].backend_port}"
    for api in ("ollama", "openai", "anthropic"):
        arguments = ("--url", url, "--api", api, "-m", MODEL, "--out", api, "--json")
        found = (await gpumesh("bench", "run", *SOON, *arguments)).json()
        (stage,) = found["stages"]
        assert (stage["served"], stage["failed"], stage["output_tokens"]) == (2, 0, 6)
        assert found["environment"]["url"] == url


async def test_repeated_runs_and_a_single_one_beside_each_other(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    repeated = await gpumesh("bench", "run", "--repeat", "2", *SOON, "--out", "a", "--json", "--quiet")
    assert names(gpumesh.home / "a") == ["report.html", "result.json", "run-1", "run-2"]
    assert all(names(gpumesh.home / "a" / f"run-{number}") == FILES for number in (1, 2))
    joint = repeated.json()
    assert joint == json.loads((gpumesh.home / "a" / "result.json").read_text())
    assert [stage["requests"] for stage in joint["stages"]] == [4, 4, 8]
    assert [stage["requests"] for run in joint["runs"] for stage in run["stages"]] == [2, 2, 4, 2, 2, 4]
    await gpumesh("bench", "run", "-n", "2", "--tokens", "6", "--out", "b", "--quiet")
    refused = await gpumesh("bench", "compare", "a", "b", code=2)
    assert "not the same tokens: 3 and 6" in refused.err
    found = (await gpumesh("bench", "compare", "a", "b", "--force", "--json")).json()
    assert (found["schema"], found["basis"]) == ("gpumesh.bench-compare/1", "between-runs")
    assert {one["stage"] for one in found["differences"]} == {"alpha", "beta", "mesh"}


async def test_what_fails_is_said_and_measured_all_the_same(two: SimulatedMesh) -> None:
    await two.hosts["beta"].set_faults(Faults(status=500, paths=("/api/chat",)))
    ended = await two.gpumesh("bench", "run", *SOON, "--out", "r", code=1)
    assert "2 requests failed" in ended.err
    assert names(two.gpumesh.home / "r") == FILES
    rows = {line.split()[0]: line.split() for line in ended.out.splitlines()[2:5]}
    assert rows["beta"][2:4] == ["0", "2"]
    assert rows["mesh"][2:4] == ["4", "0"], "there the other one answers"


async def test_a_node_that_cannot_be_measured_is_named(two: SimulatedMesh) -> None:
    await two.hosts["beta"].set_faults(Faults(status=500))
    ended = await two.gpumesh("bench", "run", *SOON, "--out", "r")
    assert [line.split()[0] for line in ended.out.splitlines()[2:4]] == ["alpha", "mesh"]
    assert "beta is not measured: " in ended.err


async def begin_second_stage(made: SimulatedMesh) -> None:
    """Returns when the node beta is measured, so that the stage of alpha is whole."""
    async with asyncio.timeout(30):
        while made.hosts["beta"].counters.finished < 4:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGINT, 130, "interrupted by Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
async def test_a_signal_leaves_what_was_measured(two: SimulatedMesh, number: int, code: int, reason: str) -> None:
    gpumesh = two.gpumesh
    async with gpumesh.started("bench", "run", "-n", "12", "--tokens", "40", "--out", "r") as process:
        await begin_second_stage(two)
        process.send_signal(number)
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    assert b"Traceback" not in err
    lines = out.decode().splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["alpha", "beta"]
    assert lines[3].split()[1] == "(partial)"
    assert reason in lines[4]
    assert b"partial result in r" in err
    folder = gpumesh.home / "r"
    assert names(folder) == FILES
    document = json.loads((folder / "result.json").read_text())
    assert document["partial"]
    assert reason in document["partial_reason"]
    assert [(stage["served"], stage["partial"]) for stage in document["stages"][:1]] == [(12, False)]
    records = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert sum(record["stage"] == "alpha" for record in records) == 12
    assert "unfinished" in {record["outcome"] for record in records if record["stage"] == "beta"}
    assert reason in (folder / "report.html").read_text()
    assert (await gpumesh("bench", "show", "r")).out == out.decode()
    async with asyncio.timeout(20):
        while two.hosts["beta"].counters.running:
            await asyncio.sleep(0.01)


async def test_after_kill_9_the_whole_stages_can_be_read(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    async with gpumesh.started("bench", "run", "-n", "8", "--tokens", "40", "--out", "r") as process:
        await begin_second_stage(two)
        process.kill()
        await process.wait()
    shown = await gpumesh("bench", "show", "r")
    assert [line.split()[0] for line in shown.out.splitlines()[2:3]] == ["alpha"]
    assert "Partial result: the run still goes on, or it was killed." in shown.out
    assert "Partial result" in (gpumesh.home / "r" / "report.html").read_text()


async def test_ctrl_c_before_anything_is_measured_leaves_nothing(two: SimulatedMesh) -> None:
    await two.hosts["alpha"].set_faults(Faults(hang=True, paths=("/api/chat",)))
    gpumesh = two.gpumesh
    async with gpumesh.started("bench", "run", *SOON, "--out", "r") as process:
        async with asyncio.timeout(30):
            while not (gpumesh.home / "r" / "result.json").exists():
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert not (gpumesh.home / "r").exists()


async def test_a_mesh_that_is_killed_meanwhile(two: SimulatedMesh) -> None:
    gpumesh = two.gpumesh
    await gpumesh("up", "-d")
    mesh = gpumesh.leader()
    async with gpumesh.started("bench", "run", "-n", "12", "--tokens", "40", "--out", "r") as process:
        await begin_second_stage(two)
        os.kill(mesh, signal.SIGKILL)
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    assert process.returncode == 1, err.decode()
    assert b"Traceback" not in err
    assert b"error: the mesh that ran for this file ended without stopping" in err
    (whole, partial) = json.loads((gpumesh.home / "r" / "result.json").read_text())["stages"]
    assert (whole["served"], whole["partial"]) == (12, False)
    assert (partial["failed"], partial["cut"], partial["partial"]) == (0, 0, True)
    assert "the mesh that ran for this file ended without stopping" in out.decode()


async def test_progress_is_on_the_terminal_and_only_there(two: SimulatedMesh) -> None:
    async with two.gpumesh.terminal("bench", "run", "-n", "20", "--tokens", "20", "--out", "r") as shown:
        await shown.wait_exit()
    assert "requests" in shown.written
    assert "STAGE" in shown.written


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--scenario", "dance"], 2, "is none of: quick, sweep, scale, overhead, failover, replay"),
        (["-c", "1,x"], 2, "is not a list of numbers"),
        (["-c", "0"], 2, "from 1 to 4096"),
        (["-n", "0"], 2, "-n must be at least 1"),
        (["--rate", "4", "--scenario", "sweep"], 2, "are for --scenario load, not for sweep"),
        (["--rate", "0"], 2, "--rate must be more than 0"),
        (["--tokens", "many"], 2, "--tokens 'many': write 64"),
        (["--rate", "4", "--arrivals", "burst"], 2, "constant, poisson, burst:N"),
        (["--prompts", "nowhere.jsonl"], 2, "cannot read nowhere.jsonl"),
        (["--scenario", "replay"], 2, "needs a trace"),
        (["--trace", "nowhere.csv", "--scenario", "replay"], 2, "cannot read nowhere.csv"),
        (["--node", "gamma"], 2, "there is no node 'gamma'"),
        (["--via", "air"], 2, "--via 'air' is none of: gateway, mesh, direct"),
        (["--api", "openai"], 2, "--api is for --url only"),
        (["--url", "http://127.0.0.1:1", "--api", "openai"], 2, "--url needs a model"),
        (["--url", "http://127.0.0.1:1", "-m", MODEL], 2, "--url needs --api"),
        (["--url", "127.0.0.1", "--api", "openai", "-m", MODEL], 2, "is no URL of a server"),
        (["--url", "http://127.0.0.1:1", "--api", "openai", "-m", MODEL, "--via", "mesh"], 2, "does not fit to --url"),
        (
            ["--url", "http://127.0.0.1:1", "--api", "ollama", "--scenario", "scale", "-m", MODEL],
            2,
            "cannot be measured",
        ),
        (["-m", "llama3"], 4, "no node can serve 'llama3'"),
    ],
)
async def test_what_cannot_be_measured(two: SimulatedMesh, arguments: list[str], code: int, said: str) -> None:
    ended = await two.gpumesh("bench", "run", *arguments, code=code)
    assert said in ended.err
    assert ended.out == ""
    assert not list(two.gpumesh.home.rglob("result.json"))
