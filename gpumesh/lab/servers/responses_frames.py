"""The frames of ``/v1/responses``, OpenAI's."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.engine import Timings
from gpumesh.lab.servers.chat_frames import SSE, encode_event
from gpumesh.lab.servers.replies import dump_json

_numbers = count(1)


class ResponseFrames:
    """The events of ``/v1/responses``, in OpenAI's order. The answer is one item: a message, or a tool call."""

    content_type = SSE

    def __init__(self, name: str) -> None:
        self._name = name
        self._id = f"resp_{next(_numbers)}"
        self._item = f"msg_{next(_numbers)}"
        self._sequence = 0
        self._text: list[str] = []
        self._tool: ToolCall | None = None
        self._is_open = False

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        self._tool = tool or self._tool
        start = self._open()
        if not content or thinking:
            return start
        self._text.append(content)
        return start + self._event("response.output_text.delta", **self._position(), delta=content)

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        text = "".join(self._text)
        item = self._message(text, "completed")
        return (
            self._open()
            + self._event("response.output_text.done", **self._position(), text=text)
            + self._event("response.content_part.done", **self._position(), part=item["content"][0])
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event("response.completed", response=self._response(self._output(text), reason, timings))
        )

    def encode_error(self, message: str) -> bytes:
        return self._event("error", code="server_error", message=message, param=None)

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        self._tool = answer.tool
        return self._response(self._output("".join(answer.tokens)), answer.done_reason, timings)

    def _open(self) -> bytes:
        if self._is_open:
            return b""
        self._is_open = True
        response = self._response([], None, None)
        part = {"type": "output_text", "text": "", "annotations": []}
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event("response.output_item.added", output_index=0, item=self._message(None, "in_progress"))
            + self._event("response.content_part.added", **self._position(), part=part)
        )

    def _position(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> bytes:
        self._sequence += 1
        return encode_event({"type": kind, "sequence_number": self._sequence - 1, **more}, kind)

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _output(self, text: str) -> list[dict[str, Any]]:
        if self._tool is None:
            return [self._message(text, "completed")]
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
