"""The frames of simulated answers in OpenAI's ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import count
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.inference.engine import Timings
from gpumesh.lab.servers.replies import dump_json

SSE = "text/event-stream"
# For the ids of answers and tool calls. All numbers have six digits, so a fault that cuts an answer after N bytes cuts
# each answer at the same place.
_next_number = count(100_000)


def encode_event(document: Any, name: str | None = None) -> bytes:
    """The document as a server-sent event; ``name`` is the event's name, if it has one."""
    event_line = f"event: {name}\n" if name else ""
    return f"{event_line}data: {dump_json(document)}\n\n".encode()


class ChatFrames:
    """The form of one answer of ``/v1/chat/completions`` by the model ``name``.

    ``usage``: the client wants the counters at the end of a streamed answer (``stream_options.include_usage``).
    """

    content_type = SSE

    def __init__(self, name: str, *, usage: bool) -> None:
        self._usage = usage
        self._called_tool = False  # whether the answer has a tool call
        self._base = {
            "id": f"chatcmpl-{next(_next_number)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": "fp_ollama_lab",
        }

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        """A chunk with the next piece. Thinking is in ``reasoning``, as Ollama writes it."""
        delta: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking:
            delta["reasoning"] = thinking
        if tool is not None:
            self._called_tool = True
            delta["tool_calls"] = [build_tool_call(tool)]
        return encode_event(self._chunk(delta, None))

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        """The chunk with the finish reason, the chunk with the usage if the client wants it, and ``[DONE]``."""
        finish_reason = "tool_calls" if self._called_tool else reason
        frames = encode_event(self._chunk({"role": "assistant", "content": ""}, finish_reason))
        if self._usage:
            frames += encode_event({**self._base, "choices": [], "usage": build_usage(timings)})
        return frames + b"data: [DONE]\n\n"

    def encode_error(self, message: str) -> bytes:
        del message  # Ollama loses the message of an error in mid-stream, and sends no [DONE]
        return encode_event(self._chunk({"role": "assistant", "content": ""}, None))

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        """The whole answer as a ``chat.completion``."""
        message: dict[str, Any] = {"role": "assistant", "content": "" if answer.tool else "".join(answer.tokens)}
        if answer.thinking:
            message["reasoning"] = "".join(answer.thinking)
        if answer.tool is not None:
            message["tool_calls"] = [build_tool_call(answer.tool)]
        reason = "tool_calls" if answer.tool else answer.done_reason
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": build_usage(timings)}

    def _chunk(self, delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        """A chunk of the stream. ``reason`` is ``None`` until the answer is complete."""
        return {**self._base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


class CompletionFrames:
    """The form of one answer of ``/v1/completions`` by the model ``name``. ``usage`` as in ``ChatFrames``."""

    content_type = SSE

    def __init__(self, name: str, *, usage: bool) -> None:
        self._usage = usage
        self._base = {
            "id": f"cmpl-{next(_next_number)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": "fp_ollama_lab",
        }

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        del thinking, tool  # a raw prompt has neither
        return encode_event(self._chunk(content, None))

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        """The chunk with the finish reason, the chunk with the usage if the client wants it, and ``[DONE]``."""
        frames = encode_event(self._chunk("", reason))
        if self._usage:
            frames += encode_event({**self._base, "choices": [], "usage": build_usage(timings)})
        return frames + b"data: [DONE]\n\n"

    def encode_error(self, message: str) -> bytes:
        del message  # Ollama loses the message, as in a chat
        return encode_event(self._chunk("", None))

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        return {**self._chunk("".join(answer.tokens), answer.done_reason), "usage": build_usage(timings)}

    def _chunk(self, content: str, reason: str | None) -> dict[str, Any]:
        """A chunk of the stream, or the whole answer. ``reason`` is ``None`` until the answer is complete."""
        return {**self._base, "choices": [{"text": content, "index": 0, "finish_reason": reason}]}


def build_usage(timings: Timings) -> dict[str, int]:
    """OpenAI's ``usage``: the numbers of tokens."""
    return {
        "prompt_tokens": timings.prompt_tokens,
        "completion_tokens": timings.tokens,
        "total_tokens": timings.prompt_tokens + timings.tokens,
    }


def build_tool_call(tool: ToolCall) -> dict[str, Any]:
    """A member of OpenAI's ``tool_calls``. Its arguments are JSON in a string."""
    arguments = json.dumps(dict(tool.arguments), ensure_ascii=False)
    function = {"name": tool.name, "arguments": arguments}
    return {"id": f"call_{next(_next_number)}", "index": 0, "type": "function", "function": function}
