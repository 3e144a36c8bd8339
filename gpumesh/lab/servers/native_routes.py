"""The native routes of the simulated Ollama, at / and /api: chat, generate, embed, tags, ps, show, pull, create."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from gpumesh.lab import text
from gpumesh.lab.answers import ApiError, GenerationRequest, render_request
from gpumesh.lab.inference.keep_alive import parse_keep_alive
from gpumesh.lab.inference.runners import Runner
from gpumesh.lab.profile import ModelProfile
from gpumesh.lab.servers.native_frames import NDJSON, NativeFrames, build_message, format_now
from gpumesh.lab.servers.replies import dump_json, json_response, read_json
from gpumesh.lab.servers.server import SimServer

MIB = 1 << 20
NEVER_EXPIRES = timedelta(days=365 * 292)  # about the longest duration of Go, which Ollama uses for keep_alive -1


def add_routes(app: web.Application, server: SimServer, blobs: set[str]) -> None:
    """Adds all of these routes to the application. ``blobs``: see ``NativeRoutes``."""
    routes = NativeRoutes(server, blobs)
    app.router.add_get("/", routes.root)  # aiohttp adds HEAD to each GET, unless ``allow_head`` is false
    app.router.add_get("/api/version", routes.version)
    app.router.add_get("/api/tags", routes.tags)
    app.router.add_get("/api/ps", routes.ps, allow_head=False)
    app.router.add_get("/api/status", routes.status, allow_head=False)
    app.router.add_post("/api/show", routes.show)
    app.router.add_post("/api/generate", routes.generate)
    app.router.add_post("/api/chat", routes.chat)
    app.router.add_post("/api/embed", routes.embed)
    app.router.add_post("/api/embeddings", routes.embeddings)
    app.router.add_post("/api/pull", routes.pull)
    app.router.add_post("/api/create", routes.create)
    app.router.add_post("/api/copy", routes.copy)
    app.router.add_delete("/api/delete", routes.delete)
    app.router.add_head("/api/blobs/{digest}", routes.has_blob)
    app.router.add_post("/api/blobs/{digest}", routes.add_blob)


class NativeRoutes:
    """The handlers of Ollama's own routes. A handler raises ApiError to refuse a request.

    ``blobs`` are the digests of the files that clients have uploaded.
    """

    def __init__(self, server: SimServer, blobs: set[str]) -> None:
        self._server = server
        self._blobs = blobs
        self._engine = server.engine

    async def root(self, _request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def version(self, _request: web.Request) -> web.Response:
        return json_response({"version": self._server.profile.version})

    async def status(self, _request: web.Request) -> web.Response:
        """Tells that the server works, and that it is simulated."""
        return json_response({"status": "ok", "simulated": True})

    async def tags(self, _request: web.Request) -> web.Response:
        """Lists the stored models, the latest first."""
        store = self._engine.store

        def stored_at(name: str) -> datetime:
            _model, time = store[name]
            return time

        names = sorted(store, key=stored_at, reverse=True)
        return json_response({"models": [_tag(name, *store[name]) for name in names]})

    async def ps(self, _request: web.Request) -> web.Response:
        """Lists the models in memory."""
        return json_response({"models": [self._runner_entry(runner) for runner in self._engine.list_runners()]})

    def _runner_entry(self, runner: Runner) -> dict[str, Any]:
        """The loaded model's entry in /api/ps."""
        model = runner.model
        seconds_left = runner.expires_at - self._engine.clock()
        time_left = NEVER_EXPIRES if math.isinf(seconds_left) else timedelta(seconds=seconds_left)
        return {
            "name": model.name,
            "model": model.name,
            "size": model.vram_mib * MIB,
            "digest": model.digest,
            "details": _details(model),
            "expires_at": format_timestamp(datetime.now(UTC) + time_left),
            "size_vram": self._engine.vram_mib(model) * MIB,
            "context_length": runner.context_length,
        }

    async def show(self, request: web.Request) -> web.Response:
        """Describes a stored model: its architecture, template and capabilities."""
        body = await read_json(request)
        model, stored_at = self._find_stored(body.get("model") or body.get("name"))
        info = {
            "general.architecture": model.family,
            "general.parameter_count": int(float(model.parameter_size.rstrip("BM")) * 1e9),
            f"{model.family}.context_length": model.context_length,
            # 3584: as in Qwen 2.5 7B, the lab's usual model.
            f"{model.family}.embedding_length": text.EMBEDDING_LENGTH if model.embedding else 3584,
        }
        return json_response(
            {
                "modelfile": f"# a simulated model\nFROM {model.name}\n",
                "parameters": "",
                "template": "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}",
                "details": _details(model),
                "model_info": info,
                "capabilities": capabilities(model),
                "modified_at": format_timestamp(stored_at),
            }
        )

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answers a prompt. With ``raw``, the model gets the prompt as it is; otherwise as a chat of one message."""
        body = await read_json(request)
        raw = body.get("raw") is True
        prompt = str(body.get("prompt") or "")
        generation = self._server.read_generation_request(body)  # errors about the model come before all others
        if generation.model.embedding:
            raise ApiError(400, f'"{generation.name}" does not support generate')
        if not prompt and not body.get("suffix"):
            return await self._preload(body, {"response": ""})
        messages = None if raw else [{"role": "user", "content": prompt}]
        if messages is not None and body.get("system"):
            messages.insert(0, {"role": "system", "content": str(body["system"])})
        generation = self._server.read_generation_request(
            body, **read_common_parts(body), messages=messages, prompt=prompt if raw else None
        )
        if body.get("_debug_render_only") is True:
            return json_response(
                {
                    "model": generation.name,
                    "created_at": format_now(),
                    **_rendered_prompt(generation),
                    "response": "",
                }
            )
        frames = NativeFrames(generation.name, chat=False, raw=raw)
        return await self._server.write_answer(request, generation, frames, stream=_wants_stream(body))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answers the messages of a chat. Without messages, only loads or unloads the model."""
        body = await read_json(request)
        messages = body.get("messages") or []
        if not isinstance(messages, list) or not all(isinstance(entry, dict) for entry in messages):
            raise ApiError(400, "json: cannot unmarshal messages into Go struct field ChatRequest.messages")
        generation = self._server.read_generation_request(
            body, **read_common_parts(body), messages=messages, tools=body.get("tools") or ()
        )
        if generation.model.embedding:
            raise ApiError(400, f'"{generation.name}" does not support chat')
        if not messages:
            return await self._preload(body, {"message": build_message("", "", None)})
        if body.get("_debug_render_only") is True:
            return json_response({"model": generation.name, "created_at": format_now(), **_rendered_prompt(generation)})
        frames = NativeFrames(generation.name, chat=True)
        return await self._server.write_answer(request, generation, frames, stream=_wants_stream(body))

    async def _preload(self, body: Mapping[str, Any], content: Mapping[str, Any]) -> web.Response:
        """Loads or unloads the model, as a request without a prompt asks for. The answer has ``content``."""
        generation = self._server.read_generation_request(body, **read_common_parts(body))
        await self._engine.preload(generation.model, generation.options, generation.keep_alive)
        unloads = parse_keep_alive(generation.keep_alive, 1.0) == 0  # 1.0: any default but 0, which would unload
        reason = "unload" if unloads else "load"
        return json_response(
            {"model": generation.name, "created_at": format_now(), **content, "done": True, "done_reason": reason}
        )

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """Answers with an embedding of each text of ``input``."""
        body = await read_json(request)
        embed_input = body.get("input", "")
        texts = [embed_input] if isinstance(embed_input, str) else [str(entry) for entry in embed_input or []]
        if texts == [""]:
            texts = []  # a single empty text has no embedding
        return json_response(await self._embed_texts(body, texts))

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Answers with an embedding of ``prompt``: the older form of ``/api/embed``."""
        body = await read_json(request)
        answer = await self._embed_texts(body, [str(body.get("prompt") or "")])
        return json_response({"embedding": answer["embeddings"][0]})

    async def _embed_texts(self, body: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
        """Builds the answer of ``/api/embed``, with an embedding of each text, after the time that prefill takes."""
        name = body.get("model")
        # This route has a message of its own for a missing model. ``read_generation_request`` has those of all routes.
        if isinstance(name, str) and name and self._engine.find_model(name) is None:
            raise ApiError(404, f'model "{name}" not found, try pulling it first')
        generation = self._server.read_generation_request(body, **read_common_parts(body))
        asked_at = self._engine.clock()
        prompt_tokens = 0
        async with self._engine.lease_slot(generation.model, generation.options, generation.keep_alive) as lease:
            for entry in texts:
                tokens, _seconds = await self._engine.prefill(lease, entry)
                prompt_tokens += tokens
        return {
            "model": generation.name,
            "embeddings": [text.make_embedding(entry) for entry in texts],
            "total_duration": int((self._engine.clock() - asked_at) * 1e9),
            "load_duration": int(lease.load_s * 1e9),
            "prompt_eval_count": prompt_tokens,
        }

    # -- the store ---------------------------------------------------------------------------------------------------

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """Simulates the download of a model, in the time ``pull_s`` of the profile."""
        body = await read_json(request)
        name = str(body.get("model") or body.get("name") or "")
        if not name:
            raise ApiError(400, "model is required")
        return await _write_progress(request, body, self._pull_steps(name if ":" in name else f"{name}:latest"))

    async def _pull_steps(self, name: str) -> AsyncIterator[dict[str, Any]]:
        """The progress of a download, which stores the model at its end. A name with ``missing`` in it is not found.

        A model that this host does not know gets the default values of ``ModelProfile``.
        """
        yield {"status": "pulling manifest"}
        if "missing" in name:
            yield {"error": "pull model manifest: file does not exist"}
            return
        model = self._engine.find_model(name) or ModelProfile(name)
        total_bytes, step_count = model.size_mib * MIB, 20
        for step in range(step_count + 1):
            yield {
                "status": f"pulling {model.digest[:12]}",
                "digest": f"sha256:{model.digest}",
                "total": total_bytes,
                "completed": total_bytes * step // step_count,
            }
            await asyncio.sleep(self._server.profile.pull_s / step_count)
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        self._engine.store[name] = (model, datetime.now(UTC))
        yield {"status": "success"}

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Stores the model ``from`` under the name ``model``."""
        body = await read_json(request)
        name = str(body.get("model") or body.get("name") or "")
        if not name:
            raise ApiError(400, "model is required")
        base, _stored_at = self._find_stored(body.get("from"))
        self._store_copy(base, name)
        return await _write_progress(
            request, body, _status_steps("using existing layer", "writing manifest", "success")
        )

    async def copy(self, request: web.Request) -> web.Response:
        """Stores the model ``source`` under the name ``destination`` too."""
        body = await read_json(request)
        base, _stored_at = self._find_stored(body.get("source"))
        self._store_copy(base, str(body.get("destination") or ""))
        return web.Response()

    async def delete(self, request: web.Request) -> web.Response:
        """Deletes a stored model. A loaded model stays in memory until it expires."""
        body = await read_json(request)
        model, _stored_at = self._find_stored(body.get("model") or body.get("name"))
        del self._engine.store[model.name]
        return web.Response()

    async def has_blob(self, request: web.Request) -> web.Response:
        """Answers 200 if a file with this digest was uploaded, otherwise 404."""
        return web.Response(status=200 if request.match_info["digest"] in self._blobs else 404)

    async def add_blob(self, request: web.Request) -> web.Response:
        """Takes an uploaded file: only its digest is kept, after a check that it is right."""
        digest = request.match_info["digest"]
        if f"sha256:{hashlib.sha256(await request.read()).hexdigest()}" != digest:
            raise ApiError(400, "digest mismatch")
        self._blobs.add(digest)
        return web.Response(status=201)

    def _store_copy(self, base: ModelProfile, name: str) -> None:
        """Stores ``base`` under one more name. Raises ApiError if the name is empty."""
        if not name:
            raise ApiError(400, "destination is required")
        full_name = name if ":" in name else f"{name}:latest"
        self._engine.store[full_name] = (replace(base, name=full_name), datetime.now(UTC))

    def _find_stored(self, name: Any) -> tuple[ModelProfile, datetime]:
        """Returns the stored model of this name and the time when it was stored. Raises ApiError if there is none."""
        if not isinstance(name, str) or not name:
            raise ApiError(400, "model is required")
        model = self._engine.find_model(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return self._engine.store[model.name]


def capabilities(model: ModelProfile) -> list[str]:
    """What the model can do, in Ollama's words."""
    if model.embedding:
        return ["embedding"]
    names = ["completion"]
    if model.tools:
        names.append("tools")
    if model.thinking:
        names.append("thinking")
    return names


def format_timestamp(at: datetime) -> str:
    """Writes the time as RFC 3339 with nanoseconds, as Go does. Python has microseconds: the last digits are fixed."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "417Z"


def read_common_parts(body: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the members that all of Ollama's own requests for answers have, for a ``GenerationRequest``.

    Raises ApiError for a ``keep_alive`` that Go cannot read.
    """
    options = body.get("options") or {}
    try:
        # Only a check, for which the default (0.0) has no meaning: the engine reads the value when it needs it.
        parse_keep_alive(body.get("keep_alive"), 0.0)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    return {
        "options": dict(options) if isinstance(options, dict) else {},
        "keep_alive": body.get("keep_alive"),
        "think": body.get("think"),
        "format": body.get("format"),
    }


def _rendered_prompt(generation: GenerationRequest) -> dict[str, Any]:
    """The member of the answer to a request with ``_debug_render_only``: the prompt that the model would get."""
    return {"_debug_info": {"rendered_template": render_request(generation)}}


def _details(model: ModelProfile) -> dict[str, Any]:
    """The member ``details`` of a model in /api/tags, /api/ps and /api/show."""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.family,
        "families": [model.family],
        "parameter_size": model.parameter_size,
        "quantization_level": model.quantization,
    }


def _tag(name: str, model: ModelProfile, stored_at: datetime) -> dict[str, Any]:
    """The stored model's entry in /api/tags."""
    return {
        "name": name,
        "model": name,
        "modified_at": format_timestamp(stored_at),
        "size": model.size_mib * MIB,
        "digest": model.digest,
        "details": _details(model),
        "capabilities": capabilities(model),
    }


def _wants_stream(body: Mapping[str, Any]) -> bool:
    """Whether the answer is streamed: Ollama streams unless ``stream`` is false."""
    return body.get("stream") is not False


async def _status_steps(*statuses: str) -> AsyncIterator[dict[str, Any]]:
    """Yields each status as a step: the progress of an operation that takes no time."""
    for status in statuses:
        yield {"status": status}


async def _write_progress(
    request: web.Request, body: Mapping[str, Any], steps: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    """Writes each step as a line as soon as it comes. If ``stream`` is false, the answer is the last step alone.

    A step with ``error`` then has the status 500. A stream always has 200, because the status is sent before the steps.
    """
    if not _wants_stream(body):
        *_earlier_steps, last_step = [step async for step in steps]
        return json_response(last_step, status=500 if "error" in last_step else 200)
    response = web.StreamResponse(headers={"Content-Type": NDJSON})
    response.enable_chunked_encoding()
    await response.prepare(request)
    async for step in steps:
        await response.write((dump_json(step) + "\n").encode())
    await response.write_eof()
    return response
