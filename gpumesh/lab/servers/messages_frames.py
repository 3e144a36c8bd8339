"""The frames of simulated answers in Anthropic's ``/v1/messages``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.inference.engine import Timings
from gpumesh.lab.servers.chat_frames import SSE, encode_event
from gpumesh.lab.servers.replies import dump_json

_next_number = count(100_000)  # for the ids of answers. All numbers have six digits, as in chat_frames.py


class MessagesFrames:
    """The form of one answer of Anthropic's ``/v1/messages`` by the model ``name``.

    A streamed answer has content blocks, one after the other: thinking, text, a tool call.
    """

    content_type = SSE

    def __init__(self, name: str) -> None:
        self._base: dict[str, Any] = {
            "id": f"msg_{next(_next_number)}",
            "type": "message",
            "role": "assistant",
            "model": name,
        }
        self._block_index = -1  # of the open content block; -1: no block was open yet
        self._block_type: str | None = None  # of the open content block
        self._called_tool = False  # whether the answer has a tool call

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        """The event with the next piece. If no content block of its type is open, events that open one come first."""
        if tool is not None:
            self._called_tool = True
            block = {"type": "tool_use", "id": "toolu_1", "name": tool.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": dump_json(dict(tool.arguments))}
            return self._open_block(block) + self._encode_delta(delta)
        if thinking:
            delta = {"type": "thinking_delta", "thinking": thinking}
            return self._open_block({"type": "thinking", "thinking": ""}) + self._encode_delta(delta)
        return self._open_block(_EMPTY_TEXT) + self._encode_delta({"type": "text_delta", "text": content})

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        """The events that end the open content block and the message."""
        delta = {"stop_reason": _stop_reason(reason, called_tool=self._called_tool), "stop_sequence": None}
        usage = {"input_tokens": timings.prompt_tokens, "output_tokens": timings.tokens}
        # An answer without a piece has an empty block of text.
        only_block = self._open_block(_EMPTY_TEXT) if self._block_type is None else b""
        return (
            only_block
            + self._encode_event("content_block_stop", index=self._block_index)
            + self._encode_event("message_delta", delta=delta, usage=usage)
            + self._encode_event("message_stop")
        )

    def encode_error(self, message: str) -> bytes:
        return self._encode_event("error", error={"type": "api_error", "message": message})

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        """The whole answer as a ``message``, whose blocks are thinking (if any), then text or the tool call."""
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

    def _open_block(self, block: Mapping[str, Any]) -> bytes:
        """The events that begin the content block, or no bytes if a block of this type is open already.

        Before them come the events that start the message, or that end the block that is open.
        """
        if self._block_type == block["type"]:
            return b""
        if self._block_type is None:
            message = {**self._base, "content": [], "stop_reason": None, "stop_sequence": None}
            usage = {"input_tokens": 0, "output_tokens": 0}
            events = self._encode_event("message_start", message={**message, "usage": usage})
        else:
            events = self._encode_event("content_block_stop", index=self._block_index)
        self._block_type = block["type"]
        self._block_index += 1
        return events + self._encode_event("content_block_start", index=self._block_index, content_block=block)

    def _encode_delta(self, delta: Mapping[str, Any]) -> bytes:
        return self._encode_event("content_block_delta", index=self._block_index, delta=delta)

    def _encode_event(self, event_type: str, **members: Any) -> bytes:
        """An event with these members. Its type is also its name."""
        return encode_event({"type": event_type, **members}, event_type)


_EMPTY_TEXT = {"type": "text", "text": ""}


def _stop_reason(reason: str, *, called_tool: bool) -> str:
    """Anthropic's name for the reason why the answer ended (``stop`` or ``length``, or a tool call)."""
    if called_tool:
        return "tool_use"
    return "max_tokens" if reason == "length" else "end_turn"
