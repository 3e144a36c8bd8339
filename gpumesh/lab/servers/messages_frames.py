"""The frames of ``/v1/messages``, Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.engine import Timings
from gpumesh.lab.servers.chat_frames import SSE, encode_event
from gpumesh.lab.servers.replies import dump_json

_numbers = count(1)


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
        self._block = -1  # index of the open content block
        self._kind: str | None = None  # type of the open content block
        self._called_tool = False

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        if tool is not None:
            self._called_tool = True
            start = {"type": "tool_use", "id": "toolu_1", "name": tool.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": dump_json(dict(tool.arguments))}
            return self._open("tool_use", start) + self._delta(delta)
        if thinking:
            start = {"type": "thinking", "thinking": ""}
            return self._open("thinking", start) + self._delta({"type": "thinking_delta", "thinking": thinking})
        return self._open("text", {"type": "text", "text": ""}) + self._delta({"type": "text_delta", "text": content})

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        delta = {"stop_reason": _stop_reason(reason, called_tool=self._called_tool), "stop_sequence": None}
        usage = {"input_tokens": timings.prompt_tokens, "output_tokens": timings.tokens}
        first_block = b"" if self._kind else self._open("text", {"type": "text", "text": ""})
        return (
            first_block
            + self._event("content_block_stop", index=self._block)
            + self._event("message_delta", delta=delta, usage=usage)
            + self._event("message_stop")
        )

    def encode_error(self, message: str) -> bytes:
        return self._event("error", error={"type": "api_error", "message": message})

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if answer.thinking:
            content.append({"type": "thinking", "thinking": "".join(answer.thinking)})
        if answer.tool is None:
            content.append({"type": "text", "text": "".join(answer.tokens)})
        else:
            call = {"type": "tool_use", "id": "toolu_1", "name": answer.tool.name, "input": dict(answer.tool.arguments)}
            content.append(call)
        return {
            **self._base,
            "content": content,
            "stop_reason": _stop_reason(answer.done_reason, called_tool=answer.tool is not None),
            "stop_sequence": None,
            "usage": {"input_tokens": timings.prompt_tokens, "output_tokens": timings.tokens},
        }

    def _open(self, kind: str, start: Mapping[str, Any]) -> bytes:
        """The events that begin a content block of this type, unless one is open."""
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


def _stop_reason(reason: str, *, called_tool: bool) -> str:
    return "tool_use" if called_tool else "max_tokens" if reason == "length" else "end_turn"
