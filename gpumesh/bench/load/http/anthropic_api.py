"""Anthropic's ``/v1/messages`` as a client speaks it: the request, and a reader of its streamed events.

No node has such a server, so it is no dialect of ``gpumesh.backends``. The events are described in
https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

from typing import Any

from gpumesh.backends import openai, safe_json
from gpumesh.backends.base import JSON_HEADERS, ChatRequest, Chunk, HttpCall, ServerCounters
from gpumesh.backends.event_reader import BaseEventReader
from gpumesh.backends.frames import final_chunk

MESSAGES_PATH = "/v1/messages"
API_VERSION = "2023-06-01"  # the only version of the API so far; a request must name one
DEFAULT_MAX_TOKENS = 1024  # a request must have a limit
# Ollama's names of options -> the names in this API.
_OPTIONS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "num_predict": "max_tokens"}


def build_messages_call(request: ChatRequest) -> HttpCall:
    """The HTTP request for a chat. The API has no seed: the option is left out."""
    body: dict[str, Any] = {
        "model": request.model,
        "max_tokens": DEFAULT_MAX_TOKENS,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        "stream": request.stream,
    }
    body.update({_OPTIONS[name]: value for name, value in request.options.items() if name in _OPTIONS})
    if request.think is False:
        body["thinking"] = {"type": "disabled"}
    headers = (*JSON_HEADERS, ("anthropic-version", API_VERSION))
    return HttpCall("POST", MESSAGES_PATH, safe_json.dump_compact(body), headers)


class AnthropicEventReader(BaseEventReader):
    """Reads the chunks of a streamed message. The final chunk comes at ``message_stop``."""

    def __init__(self) -> None:
        super().__init__()
        self._counters: ServerCounters | None = None
        self._stop_reason: str | None = None

    def _read_frame(self, frame: dict[str, Any], chunks: list[Chunk]) -> None:
        """Reads an event of Anthropic's stream: its text, and the counts of tokens, which come at the beginning and at
        the end."""
        kind, delta = frame.get("type"), frame.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        if kind == "content_block_delta":
            text, thinking = safe_json.as_text(delta.get("text")), safe_json.as_text(delta.get("thinking"))
            if text or thinking:
                chunks.append(Chunk(text or "", thinking or ""))
        elif kind == "message_start":  # it counts the prompt; its count of the answer is only a beginning
            message = frame.get("message")
            self._counters = openai.parse_counters(message) if isinstance(message, dict) else None
        elif kind == "message_delta":
            self._stop_reason = safe_json.as_text(delta.get("stop_reason")) or self._stop_reason
            counters = openai.parse_counters(frame)
            if counters is not None:
                self._counters = counters.with_prompt_counts_of(self._counters)
        elif kind == "message_stop":
            self.done = True
            chunks.append(final_chunk(reason=self._stop_reason, counters=self._counters))
