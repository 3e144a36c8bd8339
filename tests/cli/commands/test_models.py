"""`gpumesh models` by the installed command, over the fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpumesh.lab.profile import EMBEDDER, LLAMA_8B, QWEN_7B, Faults, HostProfile, ModelProfile
from tests.cli.meshes import SimulatedMesh, background_mesh, quick_host, simulated_mesh
from tests.real.command import Gpumesh

pytestmark = [pytest.mark.slow]

PHI = ModelProfile("phi3:latest")
OLD_QWEN = ModelProfile("qwen2.5:7b", 4400, quantization="Q4_0")


def profiles() -> list[HostProfile]:
    return [
        quick_host("alpha", ssh=False, models=(QWEN_7B, EMBEDDER, PHI)),
        quick_host("beta", ssh=False, models=(OLD_QWEN, LLAMA_8B)),
        quick_host("gamma", ssh=False, models=(QWEN_7B,)),
    ]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[SimulatedMesh]:
    """A running mesh for one test, which changes what the hosts have."""
    async with background_mesh(tmp_path, *profiles()) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def modules_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    async with background_mesh(tmp_path_factory.mktemp("fleet"), *profiles()) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def shared_fleet(modules_fleet: SimulatedMesh) -> SimulatedMesh:
    """A running mesh for several tests. They pull no model that another of them asks for, and take none away."""
    await modules_fleet.wait_all_up()
    return modules_fleet


in_the_modules_loop = pytest.mark.asyncio(loop_scope="module")


def stored_models(made: SimulatedMesh, name: str) -> set[str]:
    return set(made.hosts[name].backend.engine.store)


async def test_list_is_one_table_over_the_fleet(fleet: SimulatedMesh) -> None:
    gpumesh = fleet.gpumesh
    await gpumesh("models", "load", "qwen2.5:7b", "-n", "gamma", "--keep-alive", "30m")
    ended = await gpumesh("models")
    lines = ended.out.splitlines()
    assert lines[0].split() == ["MODEL", "GiB", "KIND", "CONTEXT", "ID", "NODES", "IN", "MEMORY"]
    rows = [line.split() for line in lines[2:]]
    names = ["llama3.1:8b", "nomic-embed-text:latest", "phi3:latest", "qwen2.5:7b", "qwen2.5:7b"]
    assert [row[0] for row in rows] == names
    assert rows[0][1:5] == ["4.6", "8.0B", "Q4_K_M", "32768"]
    assert rows[3][6:8] == ["alpha,", "gamma"]
    assert " ".join(rows[3][8:]) in ("gamma 30m", "gamma 29m")
    assert rows[4][3] == "Q4_0"
    assert rows[3][5] != rows[4][5], "the digests"
    assert "qwen2.5:7b is not the same on all nodes" in ended.err

    document = (await gpumesh("models", "list", "--json", "-q")).json()
    assert document["schema"] == "gpumesh.models/1"
    (qwen, old) = [row for row in document["models"] if row["name"] == "qwen2.5:7b"]
    assert (qwen["nodes"], old["nodes"], qwen["copies"], old["copies"]) == (["alpha", "gamma"], ["beta"], 2, 2)
    assert qwen["context_length"] == 32768
    assert qwen["loaded"][0]["node"] == "gamma"

    await fleet.hosts["beta"].set_faults(Faults(refuse=True))
    ended = await gpumesh("models")
    assert "qwen2.5:7b" in ended.out


async def test_list_names_a_node_that_is_down(gpumesh: Gpumesh) -> None:
    async with simulated_mesh(gpumesh, quick_host("alpha", ssh=False), quick_host("beta", ssh=False)) as made:
        await made.hosts["beta"].set_faults(Faults(refuse=True))
        ended = await gpumesh("models")
        assert "alpha" in ended.out
        assert "beta is not counted: " in ended.err
        assert (await gpumesh("models", "list", "-q")).err == ""


@in_the_modules_loop
async def test_pull_shows_progress_for_each_node(shared_fleet: SimulatedMesh) -> None:
    ended = await shared_fleet.gpumesh("models", "pull", "phi4:latest", "-n", "alpha", "-n", "beta")
    assert sorted(ended.out.splitlines()) == ["alpha: phi4:latest pulled", "beta: phi4:latest pulled"]
    for name in ("alpha", "beta"):
        steps = [line.partition(": ")[2] for line in ended.err.splitlines() if line.startswith(f"{name}: ")]
        assert steps[0] == "pulling manifest"
        assert [step.split()[-2] for step in steps if step.endswith("%")] == [str(n) for n in range(0, 101, 10)]
        assert steps[-1] == "success"
        assert "phi4:latest" in stored_models(shared_fleet, name)
    assert "phi4:latest" not in stored_models(shared_fleet, "gamma")
    assert "phi4" in (await shared_fleet.gpumesh("models")).out, "it is there at once"
    ended = await shared_fleet.gpumesh("models", "pull", "a:1", "b:1", "--all", "-q")
    assert len(ended.out.splitlines()) == 6
    assert ended.err == ""


@in_the_modules_loop
async def test_pull_draws_bars_on_a_terminal(shared_fleet: SimulatedMesh) -> None:
    async with shared_fleet.gpumesh.terminal("models", "pull", "gemma3", "--all") as shown:
        assert await shown.wait_exit() == 0
        for name in ("alpha", "beta", "gamma"):
            await shown.wait_for_text(f"{name}: gemma3 pulled")
        assert "━" in shown.plain_text
        assert shown.is_restored()
    out = shared_fleet.gpumesh.home / "out.txt"
    async with shared_fleet.gpumesh.terminal("models", "pull", "gemma3", "--all", out=out) as shown:
        assert await shown.wait_exit() == 0
        assert "pulled" not in shown.plain_text
    assert len(out.read_text().splitlines()) == 3


@in_the_modules_loop
async def test_a_node_where_the_pull_fails_does_not_stop_the_others(shared_fleet: SimulatedMesh) -> None:
    await shared_fleet.hosts["beta"].set_faults(Faults(status=500, paths=("/api/pull",)))
    ended = await shared_fleet.gpumesh("models", "pull", "mistral", "--all", code=1)
    assert sorted(ended.out.splitlines()) == ["alpha: mistral pulled", "gamma: mistral pulled"]
    assert "beta: mistral: " in ended.err
    await shared_fleet.hosts["beta"].set_faults(Faults())
    ended = await shared_fleet.gpumesh("models", "pull", "missing", "--all", code=1)
    assert ended.err.count("file does not exist") == 3
    assert ended.err.count("hint: ") == 1


async def test_rm_load_unload(fleet: SimulatedMesh) -> None:
    gpumesh = fleet.gpumesh

    def loaded(name: str) -> set[str]:
        return {runner.model.name for runner in fleet.hosts[name].backend.engine.list_runners()}

    ended = await gpumesh("models", "load", "qwen2.5:7b", "--all")
    assert sorted(ended.out.splitlines()) == [f"{name}: qwen2.5:7b loaded" for name in ("alpha", "beta", "gamma")]
    await gpumesh("models", "load", "nomic-embed-text", "-n", "alpha")
    assert loaded("alpha") == {"qwen2.5:7b", "nomic-embed-text:latest"}
    await gpumesh("models", "unload", "nomic-embed-text")
    await gpumesh("models", "unload", "qwen2.5:7b", "--all")
    assert [loaded(name) for name in ("alpha", "beta", "gamma")] == [set(), set(), set()]
    await gpumesh("models", "rm", "llama3.1:8b")
    assert stored_models(fleet, "beta") == {"qwen2.5:7b"}
    ended = await gpumesh("models", "rm", "qwen2.5:7b", code=2)
    assert "on which node?" in ended.err
    assert "--all for 3 nodes" in ended.err
    await gpumesh("models", "rm", "qwen2.5:7b", "--all")
    assert stored_models(fleet, "gamma") == set()


async def test_sync(fleet: SimulatedMesh) -> None:
    gpumesh = fleet.gpumesh
    ended = await gpumesh("models", "sync", "--from", "alpha", "--dry-run")
    assert ended.out.splitlines() == [
        "beta: qwen2.5:7b would be pulled",
        "beta: nomic-embed-text:latest would be pulled",
        "beta: phi3:latest would be pulled",
        "gamma: nomic-embed-text:latest would be pulled",
        "gamma: phi3:latest would be pulled",
    ]
    assert "phi3:latest" not in stored_models(fleet, "gamma")
    ended = await gpumesh("models", "sync", "phi3", "--from", "alpha")
    assert sorted(ended.out.splitlines()) == ["beta: phi3:latest pulled", "gamma: phi3:latest pulled"]
    assert {"phi3:latest"} == stored_models(fleet, "beta") & stored_models(fleet, "gamma") - {"qwen2.5:7b"}
    ended = await gpumesh("models", "sync", "phi3", "--from", "alpha", "-n", "gamma")
    assert ended.err == "nothing to do: the others have all that alpha has\n"
    ended = await gpumesh("models", "sync", "qwen2.5:7b", "--from", "alpha")
    assert ended.out == "beta: qwen2.5:7b pulled\n"
    assert "beta: qwen2.5:7b is still another than on alpha: the library has a newer one" in ended.err


@in_the_modules_loop
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pull"], 2, "Missing argument 'MODEL'"),
        (["pull", "x"], 2, "on which node?"),
        (["pull", "x", "-n", "nobody"], 2, "there is no node 'nobody'"),
        (["rm", "absent"], 4, "no Ollama node that is up has 'absent'"),
        (["rm", "llama3.1:8b", "-n", "alpha"], 2, "alpha has no model 'llama3.1:8b'"),
        (["load", "qwen2.5:7b", "-n", "alpha", "--keep-alive", "soon"], 1, "alpha: qwen2.5:7b: "),
        (["sync"], 2, "Missing option '--from'"),
        (["sync", "absent", "--from", "alpha"], 2, "alpha has no model 'absent'"),
        (["list", "extra"], 2, "unexpected extra argument"),
    ],
)
async def test_wrong_arguments_are_refused(
    shared_fleet: SimulatedMesh, arguments: list[str], code: int, said: str
) -> None:
    ended = await shared_fleet.gpumesh("models", *arguments, code=code)
    assert said in ended.err
    assert ended.out == ""
