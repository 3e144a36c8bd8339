"""Formats to continue a chat on llama-server, with the partial answer after the prompt that the server renders. Pure.

``/apply-template`` renders a chat as a prompt. ``/completion`` continues that prompt with the partial answer after it.
Measured with build 10434: at temperature 0 the text is the same as in an answer without a cut. This build also
continues a last message of the assistant, whatever the template does; but without a mark, it sends the message again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.base import JSON_HEADERS, HttpCall
from gpumesh.backends.continuation.chat_streams import (
    MarkedChatFormat,
    finish_events,
    make_chunk,
    wants_usage,
    without_thinking,
)
from gpumesh.backends.continuation.event_streams import EventStreamFormat, encode_event
from gpumesh.backends.continuation.stream_format import (
    ContinuationCall,
    Frame,
    JsonObject,
    PartialAnswer,
    RenderedPrompt,
    opens_thinking,
)

COMPLETION_PATH = "/completion"
# Members of a chat's request that ``/completion`` does not know, or understands in another way. All others are passed
# on: both routes have the same names for the sampling parameters.
_CHAT_ONLY = frozenset(
    {
        "messages",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "chat_template_kwargs",
        "n",
        "response_format",
    }
)


class RenderedPromptFormat(MarkedChatFormat):
    """``/v1/chat/completions`` of llama-server. If the server does not render the prompt, or if the chat holds more
    than text, the partial answer is sent as a last message of the assistant."""

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:  # noqa: ARG002 - the thinking is over
        """Asks ``/apply-template`` for the prompt, if the chat holds only text: otherwise the prompt is incomplete."""
        if self.raw_prompt_refusal(request) is not None:
            return None
        body: dict[str, Any] = {key: request[key] for key in ("model", "messages") if key in request}
        body |= without_thinking(request)
        return HttpCall("POST", "/apply-template", safe_json.dump_compact(body), JSON_HEADERS)

    def read_rendered_prompt(self, document: JsonObject) -> RenderedPrompt | None:
        """The prompt in the answer; ``None`` if there is none, or if the partial answer cannot follow it."""
        prompt = safe_json.as_text(document.get("prompt"))
        if not prompt or opens_thinking(prompt):
            return None
        return RenderedPrompt(prompt, closes_turn=False)

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """The reason if the chat holds more than text."""
        if all(_has_only_text(message) for message in request["messages"]):
            return None
        return "not all of these messages can be told as text"

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        """A request to ``/completion``: the rendered prompt and the partial answer."""
        body: dict[str, Any] = {key: value for key, value in request.items() if key not in _CHAT_ONLY}
        body |= {"prompt": prompt + partial_answer.text, "stream": True}
        budget = self.token_budget(request)
        if budget is not None:
            body["n_predict"] = max(budget - partial_answer.tokens, 1)
        if isinstance(request.get("stop"), str):  # a chat may also give one text, ``/completion`` only a list
            body["stop"] = [request["stop"]]
        call = HttpCall("POST", COMPLETION_PATH, safe_json.dump_compact(body), JSON_HEADERS)
        return ContinuationCall(call, CompletionAsChatFormat(usage=wants_usage(request)))


class CompletionAsChatFormat(EventStreamFormat):
    """Frames of ``/completion`` that continue an answer of ``/v1/chat/completions``."""

    def __init__(self, *, usage: bool) -> None:
        super().__init__("/v1/chat/completions")
        self._usage = usage

    def read(self, frame: bytes) -> Frame:
        """Parses one event of ``/completion``."""
        event = super().read(frame)
        if event.document is None:
            return event
        text = safe_json.as_text(event.document.get("content")) or ""
        is_last = event.document.get("stop") is True
        return replace(
            event,
            text=text,
            has_content=bool(text),
            finished_choices=(0,) if is_last else (),
            ends_stream=is_last,
        )

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:
        """An event of ``/completion`` as chunks of a chat. The last event becomes the end of the stream."""
        out = encode_event(make_chunk(partial_answer, {"content": frame.text}, None)) if frame.text else b""
        document = frame.document
        if not frame.ends_stream or document is None:
            return out
        figures: dict[str, Any] = {}
        if self._usage:
            prompt = safe_json.as_count(document.get("tokens_evaluated")) or 0
            tokens = safe_json.as_count(document.get("tokens_predicted")) or 0
            figures["usage"] = {"prompt_tokens": prompt, "completion_tokens": tokens}
        if isinstance(document.get("timings"), dict):
            figures["timings"] = document["timings"]
        reason = "length" if document.get("stop_type") == "limit" else "stop"
        return out + finish_events(partial_answer, reason, figures)


def _has_only_text(message: Any) -> bool:
    """Whether a message holds only text. An image or a sound is only a placeholder in the rendered prompt, so a chat
    that has one cannot be continued from its prompt."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    return isinstance(content, str)
