"""A stand-in for vLLM's OpenAI-compatible server, made from vLLM's public source (``docs/internals/server-kinds.md``).

vLLM differs from other servers with this API in four points. It continues a last message of the assistant only with
``continue_final_message``. It has its own figures on ``/metrics``. Its errors have another form. Its API key is needed
only for paths under ``/v1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from aiohttp import web

from gpumesh.lab.answers import ApiError, GenerationRequest
from gpumesh.lab.profile import HostProfile
from gpumesh.lab.servers.chat_frames import ChatFrames, CompletionFrames, encode_event
from gpumesh.lab.servers.replies import json_response, read_json
from gpumesh.lab.servers.server import SimServer
from gpumesh.lab.servers.v1_routes import read_messages, read_options, wants_usage

VERSION = "0.11.0-lab"
_ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class SimVllm(SimServer):
    """One simulated vLLM server. All models of its profile are in memory from the start.

    The profile's ``slots`` is the server's ``--max-num-seqs``. ``api_key``: only requests with this key may use
    ``/v1``; ``None``: every request may.
    """

    def __init__(
        self, profile: HostProfile, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None
    ) -> None:
        loaded_models = tuple(replace(model, resident=True) for model in profile.models)
        super().__init__(replace(profile, models=loaded_models, load_s=0.0, shared_cache=True), host=host, port=port)
        self._api_key = api_key

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)

    def find_refusal(self, request: web.Request) -> web.Response | None:
        """Returns status 401 for a request under /v1 without the API key; otherwise ``None``."""
        if self._api_key is None or not request.path.startswith("/v1"):
            return None
        if request.headers.get("Authorization") == f"Bearer {self._api_key}":
            return None
        return json_response({"error": "Unauthorized"}, status=401)

    def build_error(self, path: str, status: int, message: str) -> web.Response:  # noqa: ARG002 - all paths have one form of error
        """Builds an error in vLLM's form."""
        error_type = _ERROR_TYPES.get(status, HTTPStatus(status).phrase)
        error = {"message": message, "type": error_type, "param": None, "code": status}
        return json_response({"error": error}, status=status)

    def build_unknown_route_error(self) -> web.Response:
        return json_response({"detail": "Not Found"}, status=404)

    # -- routes ------------------------------------------------------------------------------------------------------

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _request: web.Request) -> web.Response:
        return json_response({"version": VERSION})

    async def _metrics(self, _request: web.Request) -> web.Response:
        page = "\n".join(self._metric_lines()) + "\n"
        return web.Response(text=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def _metric_lines(self) -> Iterator[str]:
        """The lines of /metrics: vLLM's gauges of running and waiting requests and of the KV cache."""
        counters = self.counters
        running, waiting = float(counters.running), float(counters.in_flight - counters.running)
        # The KV cache has no other figure here: each request counts as one slot's share of the cache.
        gauges = (  # name, help text, value
            ("num_requests_running", "Number of requests in model execution batches.", running),
            ("num_requests_waiting", "Number of requests waiting to be processed.", waiting),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", running / self.profile.slots),
        )
        first_model = self.profile.models[0]  # a real vLLM serves one model
        for name, help_text, value in gauges:
            yield f"# HELP vllm:{name} {help_text}"
            yield f"# TYPE vllm:{name} gauge"
            yield f'vllm:{name}{{engine="0",model_name="{first_model.name}"}} {value}'

    async def _models(self, _request: web.Request) -> web.Response:
        """Lists the served models."""
        return json_response({"object": "list", "data": [self._model_card(name) for name in self.engine.store]})

    def _model_card(self, name: str) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        model, stored_at = self.engine.store[name]
        card = {"id": name, "object": "model", "created": int(stored_at.timestamp()), "owned_by": "vllm"}
        return card | {"root": name, "parent": None, "max_model_len": model.context_length}

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        """Answers the messages of a chat, or continues the last message with ``continue_final_message``.

        A client that asks for this must also set ``add_generation_prompt``, whose default is true, to false.
        """
        body = await read_json(request)
        continues = body.get("continue_final_message") is True
        if continues and body.get("add_generation_prompt", True) is True:
            raise ApiError(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        generation = self._read_request(body, messages=read_messages(body), options=read_options(body))
        # vLLM's template closes each message, except the last message of a request with ``continue_final_message``.
        generation = replace(generation, model=replace(generation.model, continues=continues))
        frames = VllmChatFrames(generation.name, usage=wants_usage(body))
        return await self.write_answer(request, generation, frames, stream=body.get("stream") is True)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        """Answers a prompt, which the model gets as it is."""
        body = await read_json(request)
        generation = self._read_request(body, prompt=str(body.get("prompt") or ""), options=read_options(body))
        frames = CompletionFrames(generation.name, usage=wants_usage(body))
        return await self.write_answer(request, generation, frames, stream=body.get("stream") is True)

    def _read_request(self, body: Mapping[str, Any], **parts: Any) -> GenerationRequest:
        """As ``read_generation_request``, but a name without a tag does not mean ``:latest``.

        Raises ApiError if the model is not served, or if the request names no model.
        """
        name = body.get("model")
        if isinstance(name, str) and name not in self.engine.store:
            raise ApiError(404, f"The model `{name}` does not exist.")
        return self.read_generation_request(body, **parts)


class VllmChatFrames(ChatFrames):
    """The frames of vLLM's ``/v1/chat/completions``: after an error in mid-stream, ``[DONE]`` follows."""

    def encode_error(self, message: str) -> bytes:
        error = {"message": message, "type": _ERROR_TYPES[500], "param": None, "code": 500}
        return encode_event({"error": error}) + b"data: [DONE]\n\n"
