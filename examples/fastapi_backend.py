"""A backend of your own on the mesh: one endpoint that streams answers to a page, one that says how the GPUs are.

pip install .. fastapi uvicorn      (.. is the clone; what pipx installs, other programs do not see)
GPUMESH_CONFIG=mesh.yaml uvicorn fastapi_backend:app

curl -N localhost:8000/answer -H 'Content-Type: application/json' -d '{"question": "Why is the sky blue?"}'
curl localhost:8000/gpus
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import gpumesh
from gpumesh import BackendError, GPUMeshError, ModelMissing, Priority, QueueFull
from gpumesh.mesh.chat import ChatStream
from gpumesh.wire import to_json

MODEL = "qwen2.5:7b"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One mesh for the whole process: its tunnels open as the process starts, and close as it ends."""
    async with gpumesh.Mesh.from_file() as mesh:  # $GPUMESH_CONFIG, ./mesh.yaml, or the platform's folder
        app.state.mesh = mesh
        yield


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    question: str
    user: str | None = None


@app.post("/answer")
async def answer(asked: Question, request: Request) -> StreamingResponse:
    mesh: gpumesh.Mesh = request.app.state.mesh
    # One session for each user: their next question finds the prompt's beginning in the same node's cache.
    stream = mesh.chat(MODEL, asked.question, session=asked.user, priority=Priority.INTERACTIVE, timeout_s=120)
    try:
        # Until the first chunk is there an error is a status; up to it, the mesh tries every node that could answer.
        first = await anext(stream)
    except GPUMeshError as error:
        raise HTTPException(status_of(error), detail=f"{error.message}; {error.hint or ''}") from error
    return StreamingResponse(
        text_of(stream, first.text), media_type="text/plain", headers={"X-Node": stream.node or ""}
    )


async def text_of(stream: ChatStream, first: str) -> AsyncIterator[str]:
    """A reader that goes away closes this, which stops the generation on the host."""
    try:
        yield first
        async for chunk in stream:
            yield chunk.text
    except BackendError as error:
        yield f"\n[the answer broke off: {error.message}]"
    finally:
        await stream.aclose()


def status_of(error: GPUMeshError) -> int:
    if isinstance(error, ModelMissing):
        return 404
    return 429 if isinstance(error, QueueFull) else 503


@app.get("/gpus")
async def gpus(request: Request) -> list[dict[str, Any]]:
    mesh: gpumesh.Mesh = request.app.state.mesh
    return [
        {"node": node.name, "health": node.health, "reason": node.reason, "gpus": to_json(node.gpus)}
        for node in mesh.snapshot().nodes
    ]
