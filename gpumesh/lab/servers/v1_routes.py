"""The stand-in's /v1: OpenAI's chat, completions, embeddings, models and responses, and Anthropic's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from gpumesh.lab import text
from gpumesh.lab.answers import ApiError
from gpumesh.lab.servers.chat_frames import ChatFrames, CompletionFrames
from gpumesh.lab.servers.messages_frames import MessagesFrames
from gpumesh.lab.servers.replies import json_response, read_json
from gpumesh.lab.servers.responses_frames import ResponseFrames
from gpumesh.lab.servers.server import SimServer


def add_routes(app: web.Application, server: SimServer) -> None:
    routes = V1Routes(server)
    add = app.router
    add.add_post("/v1/chat/completions", routes.chat)
    add.add_post("/v1/completions", routes.completions)
    add.add_post("/v1/embeddings", routes.embeddings)
    add.add_get("/v1/models", routes.models, allow_head=False)
    add.add_get("/v1/models/{model:.+}", routes.model, allow_head=False)
    add.add_post("/v1/responses", routes.responses)
    add.add_post("/v1/messages", routes.messages)


class V1Routes:
    """Handlers of OpenAI's and Anthropic's routes, as Ollama serves them."""

    def __init__(self, server: SimServer) -> None:
        self._server = server

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        generation = self._server.read_generation_request(
            body,
            messages=read_messages(body),
            options=read_options(body),
            tools=body.get("tools") or (),
            format=_read_response_format(body.get("response_format")),
            think=_read_effort(body.get("reasoning_effort")),
        )
        frames = ChatFrames(generation.name, usage=wants_usage(body))
        return await self._server.write_answer(request, generation, frames, stream=body.get("stream") is True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        # Ollama applies the model's template to this prompt, as it does for /api/generate.
        messages = [{"role": "user", "content": str(body.get("prompt") or "")}]
        generation = self._server.read_generation_request(
            body, messages=messages, options=read_options(body), think=False
        )
        frames = CompletionFrames(generation.name, usage=wants_usage(body))
        return await self._server.write_answer(request, generation, frames, stream=body.get("stream") is True)

    async def responses(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        response_input = body.get("input")
        if isinstance(response_input, str):
            messages = [{"role": "user", "content": response_input}]
        else:
            messages = list(response_input or [])
        if body.get("instructions"):
            messages.insert(0, {"role": "system", "content": str(body["instructions"])})
        if not all(isinstance(entry, dict) for entry in messages):
            raise ApiError(400, "input must be a string or a list of items")
        options = read_options({**body, "max_tokens": body.get("max_output_tokens")})
        generation = self._server.read_generation_request(
            body, messages=messages, options=options, tools=body.get("tools") or ()
        )
        return await self._server.write_answer(
            request, generation, ResponseFrames(generation.name), stream=body.get("stream") is True
        )

    async def messages(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(entry, dict) for entry in messages):
            raise ApiError(400, "messages is required")
        if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            raise ApiError(400, "max_tokens is required and must be positive")
        if body.get("system"):
            messages = [{"role": "system", "content": text.content_text(body["system"])}, *messages]
        thinking = body.get("thinking")
        think = isinstance(thinking, dict) and thinking.get("type") == "enabled"
        tools = body.get("tools") or ()
        options = read_options({**body, "stop": body.get("stop_sequences")})
        generation = self._server.read_generation_request(
            body, messages=messages, options=options, tools=tools, think=think
        )
        return await self._server.write_answer(
            request, generation, MessagesFrames(generation.name), stream=body.get("stream") is True
        )

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        embed_input = body.get("input")
        texts = [embed_input] if isinstance(embed_input, str) else [str(content) for content in embed_input or []]
        if not texts:
            raise ApiError(400, "invalid input")
        generation = self._server.read_generation_request(body)
        async with self._server.engine.lease_slot(generation.model, {}, None) as lease:
            tokens = sum([(await self._server.engine.prefill(lease, content))[0] for content in texts])
        data = [
            {"object": "embedding", "embedding": text.make_embedding(content), "index": number}
            for number, content in enumerate(texts)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": generation.name, "usage": usage})

    async def models(self, _request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._entry(name) for name in self._server.engine.store]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        model = self._server.engine.find_model(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return json_response(self._entry(model.name))

    def _entry(self, name: str) -> dict[str, Any]:
        stored = self._server.engine.store[name][1]
        return {"id": name, "object": "model", "created": int(stored.timestamp()), "owned_by": "library"}


def read_options(body: Mapping[str, Any]) -> dict[str, Any]:
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    return {"num_predict": limit, "seed": body.get("seed"), "stop": body.get("stop")}


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a chat. Raises ApiError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "[] is too short - 'messages'")
    if not all(isinstance(message, dict) for message in messages):
        raise ApiError(400, "invalid message")
    return messages


def _read_response_format(value: Any) -> object:
    """Ollama's ``format``: ``json``, a JSON schema, or ``None``."""
    if not isinstance(value, dict):
        return None
    if value.get("type") == "json_object":
        return "json"
    schema = value.get("json_schema")
    return schema.get("schema") if value.get("type") == "json_schema" and isinstance(schema, dict) else None


def _read_effort(value: Any) -> object:
    """Ollama's ``think``."""
    return False if value == "none" else value


def wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True
