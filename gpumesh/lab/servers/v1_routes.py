"""The /v1 routes of the simulated Ollama: OpenAI's chat, completions, embeddings, models, responses; /v1/messages."""

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
    """Adds all of these routes to the application."""
    routes = V1Routes(server)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completions)
    app.router.add_post("/v1/embeddings", routes.embeddings)
    app.router.add_get("/v1/models", routes.models, allow_head=False)
    app.router.add_get("/v1/models/{model:.+}", routes.model, allow_head=False)
    app.router.add_post("/v1/responses", routes.responses)
    app.router.add_post("/v1/messages", routes.messages)


class V1Routes:
    """The handlers of OpenAI's and Anthropic's routes, as Ollama serves them. A handler raises ApiError to refuse."""

    def __init__(self, server: SimServer) -> None:
        self._server = server

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answers the messages of a chat, in OpenAI's form."""
        body = await read_json(request)
        generation = self._server.read_generation_request(
            body,
            messages=read_messages(body),
            options=read_options(body),
            tools=body.get("tools") or (),
            format=_read_response_format(body.get("response_format")),
            think=_read_reasoning_effort(body.get("reasoning_effort")),
        )
        frames = ChatFrames(generation.name, usage=wants_usage(body))
        return await self._server.write_answer(request, generation, frames, stream=body.get("stream") is True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answers a prompt, in OpenAI's older form."""
        body = await read_json(request)
        # Ollama applies the model's template to this prompt, as it does for /api/generate.
        messages = [{"role": "user", "content": str(body.get("prompt") or "")}]
        generation = self._server.read_generation_request(
            body, messages=messages, options=read_options(body), think=False
        )
        frames = CompletionFrames(generation.name, usage=wants_usage(body))
        return await self._server.write_answer(request, generation, frames, stream=body.get("stream") is True)

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """Answers a text or a list of messages, in the form of OpenAI's Responses API."""
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
        options = read_options({**body, "max_tokens": body.get("max_output_tokens")})  # this API's name for the limit
        generation = self._server.read_generation_request(
            body, messages=messages, options=options, tools=body.get("tools") or ()
        )
        return await self._server.write_answer(
            request, generation, ResponseFrames(generation.name), stream=body.get("stream") is True
        )

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """Answers the messages of a chat, in Anthropic's form."""
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
        options = read_options({**body, "stop": body.get("stop_sequences")})  # Anthropic's name
        generation = self._server.read_generation_request(
            body, messages=messages, options=options, tools=tools, think=think
        )
        return await self._server.write_answer(
            request, generation, MessagesFrames(generation.name), stream=body.get("stream") is True
        )

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Answers with an embedding of each text of ``input``, in OpenAI's form."""
        body = await read_json(request)
        embed_input = body.get("input")
        texts = [embed_input] if isinstance(embed_input, str) else [str(content) for content in embed_input or []]
        if not texts:
            raise ApiError(400, "invalid input")
        generation = self._server.read_generation_request(body)
        # ``{}`` and ``None``: OpenAI's form has neither Ollama's ``options`` nor its ``keep_alive``.
        async with self._server.engine.lease_slot(generation.model, {}, None) as lease:
            total_tokens = 0
            for content in texts:
                tokens, _seconds = await self._server.engine.prefill(lease, content)
                total_tokens += tokens
        data = [
            {"object": "embedding", "embedding": text.make_embedding(content), "index": number}
            for number, content in enumerate(texts)
        ]
        usage = {"prompt_tokens": total_tokens, "total_tokens": total_tokens}
        return json_response({"object": "list", "data": data, "model": generation.name, "usage": usage})

    async def models(self, _request: web.Request) -> web.Response:
        """Lists the stored models."""
        return json_response({"object": "list", "data": [self._entry(name) for name in self._server.engine.store]})

    async def model(self, request: web.Request) -> web.Response:
        """Describes one stored model."""
        name = request.match_info["model"]
        model = self._server.engine.find_model(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return json_response(self._entry(model.name))

    def _entry(self, name: str) -> dict[str, Any]:
        """The stored model's entry in /v1/models."""
        _model, stored_at = self._server.engine.store[name]
        return {"id": name, "object": "model", "created": int(stored_at.timestamp()), "owned_by": "library"}


def read_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the members of a request in OpenAI's form into Ollama's ``options``. ``None``: not given."""
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    return {"num_predict": limit, "seed": body.get("seed"), "stop": body.get("stop")}


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads the messages of a chat. Raises ApiError if there are none, or if one of them is not an object."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "[] is too short - 'messages'")
    if not all(isinstance(message, dict) for message in messages):
        raise ApiError(400, "invalid message")
    return messages


def _read_response_format(value: Any) -> object:
    """Translates OpenAI's ``response_format`` into Ollama's ``format``: ``json``, a JSON schema, or ``None``."""
    if not isinstance(value, dict):
        return None
    if value.get("type") == "json_object":
        return "json"
    json_schema = value.get("json_schema")
    if value.get("type") == "json_schema" and isinstance(json_schema, dict):
        return json_schema.get("schema")
    return None


def _read_reasoning_effort(value: Any) -> object:
    """Translates OpenAI's ``reasoning_effort`` into Ollama's ``think``: ``none`` is false, other values stay."""
    return False if value == "none" else value


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether the client wants the counters at the end of a streamed answer."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True
