"""Without a running mesh, ``connect`` opens one in the program, over servers of two kinds."""

from __future__ import annotations

import ast
import json
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import gpumesh
from gpumesh.lab.ollama import SimOllama
from gpumesh.lab.profile import EMBEDDER, QWEN_7B, Faults
from gpumesh.lab.vllm import SimVllm
from tests.gateway.fleet import MODEL, quick_host


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Unix sockets, whose paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="gm-", dir="/tmp") as folder:
        yield Path(folder)


@asynccontextmanager
async def mesh_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **servers: SimOllama | SimVllm
) -> AsyncIterator[Path]:
    for name in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder))
    folder.chmod(0o700)
    file = folder / "mesh.yaml"
    kinds = {name: "ollama" if isinstance(server, SimOllama) else "vllm" for name, server in servers.items()}
    nodes = [{"name": name, "backend": {"url": server.url, "kind": kinds[name]}} for name, server in servers.items()]
    file.write_text(json.dumps({"gateway": {"api_key_env": "NOT_SET_HERE"}, "nodes": nodes}))
    yield file


async def test_own_mesh(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is not asked for: nobody else can open the socket. An answer that is cut goes on elsewhere."""
    one, two = quick_host("one", models=(QWEN_7B, EMBEDDER)), quick_host("two")
    async with (
        SimOllama(one) as first,
        SimOllama(two) as second,
        mesh_file(short_folder, monkeypatch, one=first, two=second) as file,
        gpumesh.connect(file) as mesh,
    ):
        assert not mesh.is_joined
        socket = Path(mesh.url.removeprefix("unix:"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        answer = await mesh.chat(MODEL, [{"role": "user", "content": "hi"}])
        assert answer.node in ("one", "two")
        assert answer.tokens
        assert answer.message.role == "assistant"
        for host in (first, second):
            await host.set_faults(Faults(end_after_tokens=2, paths=("/api/chat",)))
        with pytest.raises(gpumesh.StreamCut):
            async for _ in mesh.chat(MODEL, "hi", resume=False):
                pass
        for host in (first, second):
            await host.set_faults(Faults())
        async with mesh.chat(MODEL, "hi") as reply:
            assert reply.node in ("one", "two")
        with pytest.raises(RuntimeError, match="closed"):
            await reply
        with pytest.raises(gpumesh.UsageError, match="no node 'mars'"):
            await mesh.chat(MODEL, "hi", node="mars")
        assert len((await mesh.embed("nomic-embed-text", "a"))[0]) > 1
    assert not socket.exists()


async def test_run_many_reads_only_what_it_needs(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def prompts() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"prompt {taken}"

    async with (
        SimOllama(quick_host("one", slots=4)) as host,
        mesh_file(short_folder, monkeypatch, one=host) as file,
        gpumesh.connect(file) as mesh,
    ):
        for ordered in (True, False):
            taken = 0
            results = mesh.run_many(prompts(), model=MODEL, concurrency=2, ordered=ordered, options={"num_predict": 2})
            indexes = [(await anext(results)).index for _ in range(6)]
            assert sorted(indexes) == list(range(6)) or not ordered
            assert taken <= 6 + 2 * 4
            assert host.counters.running <= 2
            await results.aclose()  # type: ignore[attr-defined]  # the type promises an iterator only
        mixed = [{"prompt": "a"}, {"prompt": "b", "model": "no-such-model"}]
        failed = [result.ok async for result in mesh.run_many(mixed, model=MODEL)]
        assert failed == [True, False]
        with pytest.raises(ValueError, match="has no role"):
            await anext(mesh.run_many([[{"content": "x"}]], model=MODEL))


async def test_models_of_other_servers(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only vLLM has is asked in OpenAI's API; nothing else is different."""
    async with (
        SimVllm(quick_host("one")) as server,
        mesh_file(short_folder, monkeypatch, one=server) as file,
        gpumesh.connect(file) as mesh,
    ):
        (model,) = await mesh.models()
        answer = await mesh.generate(None, "hi", system="be brief", options={"num_predict": 4})
        assert (answer.model, answer.tokens) == (model.name, 4)
        pieces = [chunk.text async for chunk in mesh.chat(model.name, "hi", options={"num_predict": 4})]
        assert len(pieces) > 1


def test_the_program_from_outside_imports_gpumesh_only() -> None:
    """mypy --strict checks it with all other files (pyproject.toml), by the types that programs get."""
    tree = ast.parse(Path(__file__).with_name("outside_project.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in imported if name.startswith("gpumesh")} == {"gpumesh"}
    assert not any(
        (node.module or "").startswith("gpumesh") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    )
    assert (Path(gpumesh.__file__).parent / "py.typed").exists()
