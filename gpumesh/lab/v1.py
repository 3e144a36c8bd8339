"""The stand-in's /v1: OpenAI's chat, completions, embeddings, models and responses, and Anthropic's messages."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gpumesh.lab import text
from gpumesh.lab.answers import ApiError, PlannedAnswer, ToolCall
from gpumesh.lab.engine import Timings
from gpumesh.lab.replies import dump_json, json_response, read_json

if TYPE_CHECKING:
    from gpumesh.lab.ollama import SimOllama

SSE = "text/event-stream"
_numbers = count(1)


def add_routes(app: web.Application, server: SimOllama) -> None:
    routes = _V1(server)
    add = app.router
    add.add_post("/v1/chat/completions", routes.chat)
    add.add_post("/v1/completions", routes.completions)
    add.add_post("/v1/embeddings", routes.embeddings)
    add.add_get("/v1/models", routes.models, allow_head=False)
    add.add_get("/v1/models/{model:.+}", routes.model, allow_head=False)
    add.add_post("/v1/responses", routes.responses)
    add.add_post("/v1/messages", routes.messages)


def encode_event(document: Any, name: str | None = None) -> bytes:
    return ((f"event: {name}\n" if name else "") + f"data: {dump_json(document)}\n\n").encode()


class ChatFrames:
    """/v1/chat/completions."""

    content_type = SSE

    def __init__(self, name: str, *, usage: bool) -> None:
        self._usage = usage
        self._called = False
        self._base = {
            "id": f"chatcmpl-{next(_numbers)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": "fp_ollama_lab",
        }

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        delta: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking:
            delta["reasoning"] = thinking
        if tool is not None:
            self._called = True
            delta["tool_calls"] = [_openai_call(tool)]
        return encode_event(self._chunk(delta, None))

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        parts = [
            encode_event(self._chunk({"role": "assistant", "content": ""}, "tool_calls" if self._called else reason))
        ]
        if self._usage:
            parts.append(encode_event({**self._base, "choices": [], "usage": _usage(timings)}))
        return b"".join([*parts, b"data: [DONE]\n\n"])

    def encode_error(self, message: str) -> bytes:
        # The text of an error in mid-stream is lost here, and no [DONE] follows: so it is in Ollama.
        del message
        return encode_event(self._chunk({"role": "assistant", "content": ""}, None))

    def build_document(self, said: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "" if said.tool else "".join(said.tokens)}
        if said.thinking:
            message["reasoning"] = "".join(said.thinking)
        if said.tool is not None:
            message["tool_calls"] = [_openai_call(said.tool)]
        reason = "tool_calls" if said.tool else said.done_reason
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": _usage(timings)}

    def _chunk(self, delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        return {**self._base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


class CompletionFrames:
    """/v1/completions."""

    content_type = SSE

    def __init__(self, name: str, *, usage: bool) -> None:
        self._usage = usage
        self._base = {
            "id": f"cmpl-{next(_numbers)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": "fp_ollama_lab",
        }

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        del thinking, tool  # raw prompts have neither
        return encode_event(self._chunk(content, None))

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        usage = encode_event({**self._base, "choices": [], "usage": _usage(timings)}) if self._usage else b""
        return encode_event(self._chunk("", reason)) + usage + b"data: [DONE]\n\n"

    def encode_error(self, message: str) -> bytes:
        del message
        return encode_event(self._chunk("", None))

    def build_document(self, said: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        return {**self._chunk("".join(said.tokens), said.done_reason), "usage": _usage(timings)}

    def _chunk(self, content: str, reason: str | None) -> dict[str, Any]:
        return {**self._base, "choices": [{"text": content, "index": 0, "finish_reason": reason}]}


class ResponseFrames:
    """/v1/responses: a message as one item, in OpenAI's sequence of events."""

    content_type = SSE

    def __init__(self, name: str) -> None:
        self._name = name
        self._id = f"resp_{next(_numbers)}"
        self._item = f"msg_{next(_numbers)}"
        self._sequence = 0
        self._text: list[str] = []
        self._tool: ToolCall | None = None
        self._begun = False

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        self._tool = tool or self._tool
        start = self._begin()
        if not content or thinking:
            return start
        self._text.append(content)
        return start + self._event("response.output_text.delta", **self._place(), delta=content)

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        said = "".join(self._text)
        item = self._message(said, "completed")
        return (
            self._begin()
            + self._event("response.output_text.done", **self._place(), text=said)
            + self._event("response.content_part.done", **self._place(), part=item["content"][0])
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event("response.completed", response=self._response(self._output(said), reason, timings))
        )

    def encode_error(self, message: str) -> bytes:
        return self._event("error", code="server_error", message=message, param=None)

    def build_document(self, said: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        self._tool = said.tool
        return self._response(self._output("".join(said.tokens)), said.done_reason, timings)

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        response = self._response([], None, None)
        part = {"type": "output_text", "text": "", "annotations": []}
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", output_index=0, item=self._message(None, "in_progress"))
            + self._event("response.content_part.added", **self._place(), part=part)
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> bytes:
        self._sequence += 1
        return encode_event({"type": kind, "sequence_number": self._sequence - 1, **more}, kind)

    def _message(self, said: str | None, status: str) -> dict[str, Any]:
        content = [] if said is None else [{"type": "output_text", "text": said, "annotations": []}]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _output(self, said: str) -> list[dict[str, Any]]:
        if self._tool is None:
            return [self._message(said, "completed")]
        arguments = dump_json(dict(self._tool.arguments))
        return [
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": self._tool.name}
            | {"arguments": arguments}
        ]

    def _response(self, output: list[dict[str, Any]], reason: str | None, timings: Timings | None) -> dict[str, Any]:
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        usage = None
        if timings is not None:
            total = timings.prompt_tokens + timings.tokens
            usage = {"input_tokens": timings.prompt_tokens, "output_tokens": timings.tokens, "total_tokens": total}
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._name,
            "output": output,
            "usage": usage,
        }


class MessagesFrames:
    """Anthropic's /v1/messages."""

    content_type = SSE

    def __init__(self, name: str) -> None:
        self._base: dict[str, Any] = {
            "id": f"msg_{next(_numbers)}",
            "type": "message",
            "role": "assistant",
            "model": name,
        }
        self._block = -1
        self._kind: str | None = None
        self._called = False

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        if tool is not None:
            self._called = True
            start = {"type": "tool_use", "id": "toolu_1", "name": tool.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": dump_json(dict(tool.arguments))}
            return self._open("tool_use", start) + self._delta(delta)
        if thinking:
            start = {"type": "thinking", "thinking": ""}
            return self._open("thinking", start) + self._delta({"type": "thinking_delta", "thinking": thinking})
        return self._open("text", {"type": "text", "text": ""}) + self._delta({"type": "text_delta", "text": content})

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        delta = {"stop_reason": _anthropic_reason(reason, called=self._called), "stop_sequence": None}
        usage = {"input_tokens": timings.prompt_tokens, "output_tokens": timings.tokens}
        opened = b"" if self._kind else self._open("text", {"type": "text", "text": ""})
        return (
            opened
            + self._event("content_block_stop", index=self._block)
            + self._event("message_delta", delta=delta, usage=usage)
            + self._event("message_stop")
        )

    def encode_error(self, message: str) -> bytes:
        return self._event("error", error={"type": "api_error", "message": message})

    def build_document(self, said: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if said.thinking:
            content.append({"type": "thinking", "thinking": "".join(said.thinking)})
        if said.tool is None:
            content.append({"type": "text", "text": "".join(said.tokens)})
        else:
            call = {"type": "tool_use", "id": "toolu_1", "name": said.tool.name, "input": dict(said.tool.arguments)}
            content.append(call)
        return {
            **self._base,
            "content": content,
            "stop_reason": _anthropic_reason(said.done_reason, called=said.tool is not None),
            "stop_sequence": None,
            "usage": {"input_tokens": timings.prompt_tokens, "output_tokens": timings.tokens},
        }

    def _open(self, kind: str, start: Mapping[str, Any]) -> bytes:
        if self._kind == kind:
            return b""
        if self._kind is None:
            message = {**self._base, "content": [], "stop_reason": None, "stop_sequence": None}
            usage = {"input_tokens": 0, "output_tokens": 0}
            before = self._event("message_start", message={**message, "usage": usage})
        else:
            before = self._event("content_block_stop", index=self._block)
        self._kind = kind
        self._block += 1
        return before + self._event("content_block_start", index=self._block, content_block=start)

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return self._event("content_block_delta", index=self._block, delta=delta)

    def _event(self, kind: str, **more: Any) -> bytes:
        return encode_event({"type": kind, **more}, kind)


class _V1:
    def __init__(self, server: SimOllama) -> None:
        self._server = server

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ApiError(400, "[] is too short - 'messages'")
        work = self._server.read_generation_request(
            body,
            messages=[_openai_message(one) for one in messages],
            options=_options(body),
            tools=body.get("tools") or (),
            format=_response_format(body.get("response_format")),
            think=_effort(body.get("reasoning_effort")),
        )
        frames = ChatFrames(work.name, usage=_wants_usage(body))
        return await self._server.write_answer(request, work, frames, stream=body.get("stream") is True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        # As Ollama has it: the prompt goes through the model's template, as with /api/generate.
        messages = [{"role": "user", "content": str(body.get("prompt") or "")}]
        work = self._server.read_generation_request(body, messages=messages, options=_options(body), think=False)
        frames = CompletionFrames(work.name, usage=_wants_usage(body))
        return await self._server.write_answer(request, work, frames, stream=body.get("stream") is True)

    async def responses(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        given = body.get("input")
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given or [])
        if body.get("instructions"):
            messages.insert(0, {"role": "system", "content": str(body["instructions"])})
        if not all(isinstance(one, dict) for one in messages):
            raise ApiError(400, "input must be a string or a list of items")
        options = _options({**body, "max_tokens": body.get("max_output_tokens")})
        work = self._server.read_generation_request(
            body, messages=messages, options=options, tools=body.get("tools") or ()
        )
        return await self._server.write_answer(
            request, work, ResponseFrames(work.name), stream=body.get("stream") is True
        )

    async def messages(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise ApiError(400, "messages is required")
        if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            raise ApiError(400, "max_tokens is required and must be positive")
        if body.get("system"):
            messages = [{"role": "system", "content": text.content_text(body["system"])}, *messages]
        thinking = body.get("thinking")
        think = isinstance(thinking, dict) and thinking.get("type") == "enabled"
        tools = body.get("tools") or ()
        options = _options({**body, "stop": body.get("stop_sequences")})
        work = self._server.read_generation_request(body, messages=messages, options=options, tools=tools, think=think)
        return await self._server.write_answer(
            request, work, MessagesFrames(work.name), stream=body.get("stream") is True
        )

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request)
        given = body.get("input")
        texts = [given] if isinstance(given, str) else [str(one) for one in given or []]
        if not texts:
            raise ApiError(400, "invalid input")
        work = self._server.read_generation_request(body)
        async with self._server.engine.lease_slot(work.model, {}, None) as lease:
            tokens = sum([(await self._server.engine.prefill(lease, one))[0] for one in texts])
        data = [
            {"object": "embedding", "embedding": text.make_embedding(one), "index": at} for at, one in enumerate(texts)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": work.name, "usage": usage})

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


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    return {"num_predict": limit, "seed": body.get("seed"), "stop": body.get("stop")}


def _openai_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, "invalid message")
    return message


def _response_format(value: Any) -> object:
    if not isinstance(value, dict):
        return None
    if value.get("type") == "json_object":
        return "json"
    schema = value.get("json_schema")
    return schema.get("schema") if value.get("type") == "json_schema" and isinstance(schema, dict) else None


def _effort(value: Any) -> object:
    return False if value == "none" else value


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _usage(timings: Timings) -> dict[str, int]:
    return {
        "prompt_tokens": timings.prompt_tokens,
        "completion_tokens": timings.tokens,
        "total_tokens": timings.prompt_tokens + timings.tokens,
    }


def _openai_call(tool: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(tool.arguments), ensure_ascii=False)
    function = {"name": tool.name, "arguments": arguments}
    return {"id": f"call_{next(_numbers)}", "index": 0, "type": "function", "function": function}


def _anthropic_reason(reason: str, *, called: bool) -> str:
    return "tool_use" if called else "max_tokens" if reason == "length" else "end_turn"
