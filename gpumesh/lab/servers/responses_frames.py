"""The frames (events) of simulated answers in OpenAI's ``/v1/responses``."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.inference.engine import Timings
from gpumesh.lab.servers.chat_frames import SSE, encode_event
from gpumesh.lab.servers.replies import dump_json

# For the ids of answers and items. All numbers have six digits, as in chat_frames.py.
_next_number = count(100_000)


class ResponseFrames:
    """The form of one answer of ``/v1/responses`` by the model ``name``, with the events in OpenAI's order.

    The answer's output is one item: a message, or a tool call. A streamed tool call is only in the last event.
    """

    content_type = SSE

    def __init__(self, name: str) -> None:
        self._name = name
        self._id = f"resp_{next(_next_number)}"
        self._item_id = f"msg_{next(_next_number)}"
        self._sequence_number = 0  # of the next event
        self._text_parts: list[str] = []
        self._tool: ToolCall | None = None
        self._item_started = False

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        """The event with the next piece of text. Thinking has no event; a tool call is kept for the last event."""
        self._tool = tool or self._tool
        events = self._start_item()
        if thinking or not content:  # only text has an event of its own
            return events
        self._text_parts.append(content)
        return events + self._encode_event("response.output_text.delta", **self._position(), delta=content)

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        """The events that end the item and the response."""
        text = "".join(self._text_parts)
        item = self._message_item(text, "completed")
        return (
            self._start_item()
            + self._encode_event("response.output_text.done", **self._position(), text=text)
            # The item has one part, its text.
            + self._encode_event("response.content_part.done", **self._position(), part=item["content"][0])
            + self._encode_event("response.output_item.done", output_index=0, item=item)
            + self._encode_event("response.completed", response=self._response(self._output(text), reason, timings))
        )

    def encode_error(self, message: str) -> bytes:
        return self._encode_event("error", code="server_error", message=message, param=None)

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        self._tool = answer.tool
        return self._response(self._output("".join(answer.tokens)), answer.done_reason, timings)

    def _start_item(self) -> bytes:
        """The events before the first piece, or no bytes if they were sent already."""
        if self._item_started:
            return b""
        self._item_started = True
        response = self._response([], None, None)
        part = {"type": "output_text", "text": "", "annotations": []}
        return (
            self._encode_event("response.created", response=response)
            + self._encode_event("response.in_progress", response=response)
            + self._encode_event(
                "response.output_item.added", output_index=0, item=self._message_item(None, "in_progress")
            )
            + self._encode_event("response.content_part.added", **self._position(), part=part)
        )

    def _position(self) -> dict[str, Any]:
        """The members by which an event refers to the text of the item."""
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _encode_event(self, event_type: str, **members: Any) -> bytes:
        """An event with these members and the next sequence number. Its type is also its name."""
        document = {"type": event_type, "sequence_number": self._sequence_number, **members}
        self._sequence_number += 1
        return encode_event(document, event_type)

    def _message_item(self, text: str | None, status: str) -> dict[str, Any]:
        """A message with this text; ``None``: without content, as at the start."""
        content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _output(self, text: str) -> list[dict[str, Any]]:
        """The complete output: the tool call if the answer has one, otherwise a message with this text."""
        if self._tool is None:
            return [self._message_item(text, "completed")]
        arguments = dump_json(dict(self._tool.arguments))
        call = {"type": "function_call", "id": "fc_1", "call_id": "call_1"}
        return [{**call, "name": self._tool.name, "arguments": arguments}]

    def _response(self, output: list[dict[str, Any]], reason: str | None, timings: Timings | None) -> dict[str, Any]:
        """The response object: in progress while ``reason`` is ``None``, incomplete if a limit has cut the answer."""
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
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
