"""The frames (NDJSON lines) of simulated answers in Ollama's ``/api/chat`` and ``/api/generate``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.inference.engine import Timings
from gpumesh.lab.servers.replies import dump_json

NDJSON = "application/x-ndjson"


class NativeFrames:
    """The form of one answer of ``/api/chat`` if ``chat``, otherwise of ``/api/generate``.

    ``name`` is the model's name as the client wrote it. ``raw``: the request had a raw prompt, so the answer has no
    ``context``.
    """

    content_type = NDJSON

    def __init__(self, name: str, *, chat: bool, raw: bool = False) -> None:
        self._name = name
        self._chat = chat
        self._raw = raw
        # The part that all lines have in common is encoded once: most of a stream's cost is the encoding of its lines.
        self._line_start = f'{{"model":{dump_json(name)},"created_at":'

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        """A line with the next piece. ``/api/generate`` has no tool calls."""
        if self._chat:
            members = f'"message":{dump_json(build_message(content, thinking, tool))}'
        else:
            members = f'"response":{dump_json(content)}'
            if thinking:
                members += f',"thinking":{dump_json(thinking)}'
        return f'{self._line_start}"{format_now()}",{members},"done":false}}\n'.encode()

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        """The last line: it has no more text, but the reason and the counters."""
        content: dict[str, Any] = {"message": build_message("", "", None)} if self._chat else {"response": ""}
        return (dump_json(self._document(content, reason, timings)) + "\n").encode()

    def encode_error(self, message: str) -> bytes:
        return (dump_json({"error": message}) + "\n").encode()

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        """The whole answer as one object: the members of the last line, with the whole text."""
        content = "" if answer.tool else "".join(answer.tokens)
        thinking = "".join(answer.thinking)
        if self._chat:
            return self._document(
                {"message": build_message(content, thinking, answer.tool)}, answer.done_reason, timings
            )
        members: dict[str, Any] = {"response": content}
        if thinking:
            members["thinking"] = thinking
        return self._document(members, answer.done_reason, timings)

    def _document(self, content: Mapping[str, Any], reason: str, timings: Timings) -> dict[str, Any]:
        """The last line of an answer, or a whole answer: ``content`` and the counters, without those that are 0."""
        document = {"model": self._name, "created_at": format_now(), **content, "done": True, "done_reason": reason}
        if not self._chat and not self._raw:
            # The numbers of the tokens so far. A client may send them back; here they mean nothing, so 64 are enough.
            document["context"] = list(range(min(timings.prompt_tokens + timings.tokens, 64)))
        counters = {
            "total_duration": timings.total_ns,
            "load_duration": timings.load_ns,
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": timings.prompt_ns,
            "eval_count": timings.tokens,
            "eval_duration": timings.eval_ns,
        }
        return document | {name: value for name, value in counters.items() if value}


def format_now() -> str:
    """The time now as RFC 3339, in UTC with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def build_message(content: str, thinking: str, tool: ToolCall | None) -> dict[str, Any]:
    """The ``message`` of a chat in Ollama's form."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if tool is not None:
        message["tool_calls"] = [{"function": {"index": 0, "name": tool.name, "arguments": dict(tool.arguments)}}]
    return message
