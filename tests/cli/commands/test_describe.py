"""`describe` of a mesh that runs, and what `status`, `models`, `ui` and `doctor` print of it in all formats."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import yaml

from tests.cli.meshes import MODEL, SimulatedMesh, background_mesh, quick_host

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    async with background_mesh(
        tmp_path_factory.mktemp("mesh"), quick_host("alpha"), quick_host("beta", ssh=False)
    ) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def running(shared_mesh: SimulatedMesh) -> SimulatedMesh:
    await shared_mesh.wait_all_up()
    return shared_mesh


async def test_all_that_is_known(running: SimulatedMesh) -> None:
    shown = (await running.gpumesh("describe", "alpha")).out
    for part in ("alpha  healthy", "local end      127.0.0.1:", "RTX 4090", "GPU-", "ollama", MODEL, "in flight"):
        assert part in shown
    assert f"identity_file:\n    - {running.ssh['identity_file']}" in shown, "a setting"
    assert "beta" not in shown


async def test_as_a_document(running: SimulatedMesh) -> None:
    document = yaml.safe_load((await running.gpumesh("describe", "beta", "alpha", "-o", "yaml")).out)
    assert document["schema"] == "gpumesh.describe/1"
    beta, alpha = document["nodes"]
    assert (beta["node"]["name"], beta["settings"]["name"]) == ("beta", "beta")
    assert alpha["node"]["gpus"][0]["name"] == "NVIDIA GeForce RTX 4090"
    ended = await running.gpumesh("describe", "alhpa", code=2)
    assert "did you mean alpha?" in ended.err


async def test_status_of_some_nodes(running: SimulatedMesh) -> None:
    gpumesh = running.gpumesh
    assert (await gpumesh("status", "b*", "-o", "name")).out == "beta\n"
    assert (await gpumesh("get", "nodes", "-o", "name")).out == "alpha\nbeta\n", "a first guess"
    document = yaml.safe_load((await gpumesh("status", "beta", "--node", "alpha", "-o", "yaml")).out)
    assert [node["name"] for node in document["nodes"]] == ["alpha", "beta"]
    ended = await gpumesh("status", "betta", code=2)
    assert (ended.out, "did you mean beta?" in ended.err) == ("", True)
    async with gpumesh.terminal("status", "-o", "wide", columns=60) as shown:
        assert await shown.wait_exit() == 0
    assert "SERVED" in shown.written, "all columns"
    assert "contradict" in (await gpumesh("status", "--json", "-o", "yaml", code=2)).err


async def test_models_in_all_formats(running: SimulatedMesh) -> None:
    gpumesh = running.gpumesh
    assert (await gpumesh("models", "-o", "name")).out == f"{MODEL}\n"
    assert (await gpumesh("models", "list", "-o", "json")).json() == (await gpumesh("models", "--json")).json()


async def test_the_page_and_the_report(running: SimulatedMesh) -> None:
    gpumesh = running.gpumesh
    assert (await gpumesh("ui", "--print")).out == f"{running.gateway_url}/ui\n"
    report = (await gpumesh("doctor", "-o", "json")).json()
    assert report["mesh"]["control_socket"] == "answers"
    assert report["mesh"]["nodes_up"] == "2 of 2"
    assert report["configuration"]["nodes"] == "2: 1 direct, 1 sshtunnel"
