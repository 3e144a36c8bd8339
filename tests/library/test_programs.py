"""The programs of docs/library.md run as they are, over one mesh that runs in the background."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import gpumesh
from gpumesh.lab.profile import EMBEDDER, QWEN_7B
from gpumesh.tunnels.loop_thread import LoopThread
from tests.cli.meshes import background_mesh, quick_host
from tests.test_docs import DOCS, blocks

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PROGRAMS = {
    block.more.removeprefix('title="').removesuffix('"'): block.body
    for block in blocks(DOCS / "library.md")
    if block.kind == "python" and block.more.startswith("title=")
}


@pytest.fixture(scope="module")
def running_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment of a program beside a mesh that runs. The hosts answer in a thread: a program blocks the test."""
    folder = tmp_path_factory.mktemp("library")
    thread = LoopThread("hosts")
    thread.start()
    try:
        hosts = (quick_host(name, ssh=False, models=(QWEN_7B, EMBEDDER)) for name in ("one", "two"))
        mesh = thread.enter(background_mesh(folder, *hosts))
        with pytest.MonkeyPatch.context() as environment:
            for name, value in mesh.gpumesh.environment().items():
                environment.setenv(name, value)
            (folder / "cat.png").write_bytes(PNG)
            environment.chdir(folder)
            yield
        thread.leave()
    finally:
        thread.stop()


def run(title: str) -> dict[str, Any]:
    """Runs a program of the page, and returns its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(PROGRAMS[title], f"docs/library.md: {title}", "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("script", " tokens/s)\n"),
        ("asyncio", ""),
        ("sync streaming", "\n"),
        ("asyncio batch", "\n19 "),
        ("tools", "weather {'city': "),
        ("embeddings", "3 vectors of "),
        ("images", ""),
        ("JSON schema", "name='"),
        ("openai client", ""),
    ],
)
def test_programs_of_the_page(
    title: str, expected: str, running_mesh: None, capsys: pytest.CaptureFixture[str]
) -> None:
    client = run(title).get("client")
    if client is not None:
        client.close()  # the program leaves it to the end of the process, but a test must not
    printed = capsys.readouterr().out
    assert printed.strip()
    assert expected in printed
    assert "failed" not in printed


async def test_notebook_cell(running_mesh: None, capsys: pytest.CaptureFixture[str]) -> None:
    """In a loop that runs already."""
    assert asyncio.get_running_loop().is_running()
    run("notebook cell")
    assert capsys.readouterr().out.startswith("nomic-embed-text:latest on one, two\nqwen2.5:7b on one, two\n")


async def test_fastapi(running_mesh: None) -> None:
    app = run("FastAPI")["app"]
    async with app.router.lifespan_context(app):
        assert app.state.mesh.is_joined
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://backend") as client:
            answer = await client.get("/answer", params={"question": "Why?"})
            assert (answer.status_code, answer.headers["X-Node"] in ("one", "two")) == (200, True)
            assert answer.text.strip()


def test_no_program_of_the_page_is_left_out() -> None:
    assert len(PROGRAMS) == 11


def test_what_is_joined_reports_errors_of_the_gateway(running_mesh: None) -> None:
    with gpumesh.connect_sync() as mesh:
        assert mesh.is_joined
        with pytest.raises(gpumesh.ModelMissing) as missing:
            _ = mesh.chat("no-such-model", "hi").text
        assert "qwen2.5:7b" in (missing.value.hint or "")
        with pytest.raises(gpumesh.UsageError, match="no node of this mesh; the nodes are: one, two"):
            _ = mesh.chat("qwen2.5:7b", "hi", node="mars").text
        with pytest.raises(gpumesh.BackendStatus) as refused:
            _ = mesh.chat("nomic-embed-text", "hi").text
        assert (refused.value.status, refused.value.node in ("one", "two")) == (400, True)
        pieces = iter(mesh.chat("qwen2.5:7b", "hi"))
        assert next(pieces).text
        inside = (mesh.chat("qwen2.5:7b", "hi").text for _ in range(1))  # run_many reads it in the mesh's own thread
        with pytest.raises(RuntimeError, match="cannot wait for itself"):
            next(mesh.run_many(inside, model="qwen2.5:7b"))
        client = mesh.ollama_client()
        assert client.chat(model="qwen2.5:7b", messages=[{"role": "user", "content": "hi"}]).message.content
        client._client.close()
    pieces.close()  # type: ignore[attr-defined]  # after the mesh: it must neither hang nor warn
    with pytest.raises(RuntimeError, match="is not open"):
        mesh.status()
