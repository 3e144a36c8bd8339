"""The frames of ``/api/chat`` and ``/api/generate``, Ollama's."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.engine import Timings
from gpumesh.lab.servers.replies import dump_json

NDJSON = "application/x-ndjson"


class NativeFrames:
    """The NDJSON lines of ``/api/chat`` if ``chat``, otherwise of ``/api/generate``. ``raw``: the answer has no
    ``context``."""

    content_type = NDJSON

    def __init__(self, name: str, *, chat: bool, raw: bool = False) -> None:
        self._name = name
        self._chat = chat
        self._raw = raw
        # The part that all lines have in common is encoded once: most of a stream's cost is the encoding of its lines.
        self._head = f'{{"model":{dump_json(name)},"created_at":'

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        if self._chat:
            middle = f'"message":{dump_json(build_message(content, thinking, tool))}'
        else:
            middle = f'"response":{dump_json(content)}' + (f',"thinking":{dump_json(thinking)}' if thinking else "")
        return f'{self._head}"{format_now()}",{middle},"done":false}}\n'.encode()

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        content: dict[str, Any] = {"message": build_message("", "", None)} if self._chat else {"response": ""}
        return (dump_json(self._document(content, reason, timings)) + "\n").encode()

    def encode_error(self, message: str) -> bytes:
        return (dump_json({"error": message}) + "\n").encode()

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        content = "" if answer.tool else "".join(answer.tokens)
        thinking = "".join(answer.thinking)
        if self._chat:
            return self._document(
                {"message": build_message(content, thinking, answer.tool)}, answer.done_reason, timings
            )
        document: dict[str, Any] = {"response": content} | ({"thinking": thinking} if thinking else {})
        return self._document(document, answer.done_reason, timings)

    def _document(self, content: Mapping[str, Any], reason: str, timings: Timings) -> dict[str, Any]:
        document = {"model": self._name, "created_at": format_now(), **content, "done": True, "done_reason": reason}
        if not self._chat and not self._raw:
            document["context"] = [number % 32000 for number in range(min(timings.prompt_tokens + timings.tokens, 64))]
        figures = {
            "total_duration": timings.total_ns,
            "load_duration": timings.load_ns,
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": timings.prompt_ns,
            "eval_count": timings.tokens,
            "eval_duration": timings.eval_ns,
        }
        return document | {name: value for name, value in figures.items() if value}


def format_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def build_message(content: str, thinking: str, tool: ToolCall | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if tool is not None:
        message["tool_calls"] = [{"function": {"index": 0, "name": tool.name, "arguments": dict(tool.arguments)}}]
    return message
