"""A program of somebody else, for type checkers: it imports gpumesh and nothing below it. Nobody runs it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import assert_type

import gpumesh


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


async def use(file: Path) -> None:
    async with gpumesh.connect(file, api_key=None) as mesh:
        assert_type(mesh, gpumesh.MeshClient)
        answer = await mesh.chat("m", [{"role": "user", "content": "hi"}], options={"temperature": 0}, priority="batch")
        assert_type(answer, gpumesh.Completion)
        assert_type(answer.tokens_per_s, float | None)
        messages = [gpumesh.Message("user", "hi", images=[b"x", Path("cat.png"), "cat.png"]), answer.message]
        async for chunk in mesh.chat(None, messages, tools=[weather], format="json", priority=gpumesh.Priority.BATCH):
            assert_type(chunk.text, str)
        async with mesh.generate("m", "hi", format={"type": "object"}) as reply:
            assert_type(reply.node, str | None)
        vectors = await mesh.embed("m", ["a", "b"])
        assert_type(vectors[0], tuple[float, ...])
        async for result in mesh.run_many(["a", {"prompt": "b", "model": "c"}], model="m", ordered=False):
            assert_type(result.error, gpumesh.GPUMeshError | None)
            assert_type(result.result(), gpumesh.Completion)
        for model in await mesh.models():
            assert_type(model.nodes, tuple[str, ...])
        assert_type(await mesh.status(), gpumesh.MeshState)


def use_sync() -> None:
    with gpumesh.connect_sync("mesh.yaml") as mesh:
        assert_type(mesh.chat("m", "hi").text, str)
        for chunk in mesh.chat("m", "hi", think=True):
            assert_type(chunk, gpumesh.ReplyChunk)
        for result in mesh.run_many(("a", "b"), model="m"):
            assert_type(result.text, str)
        assert_type(mesh.models(), tuple[gpumesh.FleetModel, ...])
    try:
        gpumesh.openai_client(timeout=3)
    except (gpumesh.MeshNotRunning, gpumesh.errors.TunnelDown) as error:
        assert_type(error.hint, str | None)
    wrong: str = mesh.embed("m", "a")  # type: ignore[assignment]  # a checker that sees this has really read the types
    del wrong


if __name__ == "__main__":
    asyncio.run(use(Path("mesh.yaml")))
