"""What a server does with a last message of the assistant: it is found out with a short chat, never assumed. Pure.

The last message of the chat is SENTINEL, which no model writes, and one token is generated. What a server can do:

- It continues the message, and sends only the new text. So do Ollama with most templates, and vLLM with its mark.
- It continues the message, and sends it once more before the new text. So does llama-server without a mark, and thus
  Ollama for models whose template llama-server renders.
- It closes the message, and begins a new one. So do vLLM and others without a mark that they know.

A server that sends the sentinel has repeated the message. Otherwise, a lower count of the prompt's tokens than in the
same chat without the mark shows that the mark has left the message open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from gpumesh.backends.continuation.received_text import split_frames
from gpumesh.backends.continuation.stream_format import SENTINEL, Frame, StreamFormat
from gpumesh.backends.dialects import find_counters


class ContinuationStrategy(StrEnum):
    """How a model on a node continues a partial answer that is a last message of the assistant."""

    ASSISTANT_LAST = "assistant-last"  # the answer holds only the new text
    ASSISTANT_REPEATED = "assistant-repeated"  # the answer holds the message, and then the new text
    RAW = "raw"  # not at all, because the template closes the message: only as text after the rendered prompt


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """The answer to one of ``StreamFormat.prefill_calls``. ``prompt_tokens``: the tokens of the prompt; ``None`` if the
    server does not count them."""

    text: str
    prompt_tokens: int | None


def read_probe_reply(stream_format: StreamFormat, body: bytes) -> ProbeReply | None:
    """Reads the stream of one call. ``None`` if the stream is not complete, or holds an error."""
    text = ""
    prompt_tokens: int | None = None
    is_complete = False
    for raw in split_frames(stream_format, body + stream_format.frame_separator):
        frame = stream_format.read(raw)
        if frame.error is not None:
            return None
        text += frame.text
        is_complete = is_complete or frame.ends_stream or frame.text_complete
        counters = find_counters(raw)
        if counters is not None and counters.prompt_tokens is not None:
            prompt_tokens = counters.prompt_tokens
        if frame.ends_stream:
            break
    return ProbeReply(text, prompt_tokens) if is_complete else None


def judge_prefill(
    reply: ProbeReply | None, unmarked_reply: ProbeReply | None, *, leaves_turn_open: bool
) -> ContinuationStrategy | None:
    """What the server does; ``None`` if the replies do not show it.

    ``unmarked_reply`` is the answer to the same chat without the mark; ``None`` if the server knows no marks.
    ``leaves_turn_open``: a rendered prompt has shown that the model's template leaves the message open.
    """
    if reply is None:
        return None
    if reply.text.startswith(SENTINEL):
        return ContinuationStrategy.ASSISTANT_REPEATED
    if SENTINEL in reply.text:  # a part of the message, or something before it: this cannot be undone exactly
        return None
    if leaves_turn_open:
        return ContinuationStrategy.ASSISTANT_LAST
    if unmarked_reply is None or reply.prompt_tokens is None or unmarked_reply.prompt_tokens is None:
        return None
    if reply.prompt_tokens < unmarked_reply.prompt_tokens:  # without the mark, tokens that close the message follow
        return ContinuationStrategy.ASSISTANT_LAST
    # Both prompts are the same, and one reply has shown that the message is left open.
    same_prompt = reply.prompt_tokens == unmarked_reply.prompt_tokens
    if same_prompt and unmarked_reply.text.startswith(SENTINEL):
        return ContinuationStrategy.ASSISTANT_LAST
    return None


class RepeatedText:
    """Removes a text from the beginning of a stream, whose server repeats this text before the new text."""

    def __init__(self, text: str) -> None:
        self._missing = text  # what the server has not repeated yet

    def remove(self, frame: Frame) -> Frame | None:
        """The frame without the repeated text; ``None`` if nothing is left of it. It has an error if the server sends
        something else instead.

        The thinking before the repeated text is repeated, too, so it is removed as well.
        """
        missing, text = self._missing, frame.text
        if not missing or frame.error is not None:
            return frame
        if text.startswith(missing):
            self._missing = ""
            new_text = text[len(missing) :]
            if not (new_text or frame.calls_tools or frame.text_complete or frame.ends_stream):
                return None
            return replace(frame, text=new_text, thinking="", has_content=bool(new_text) or frame.calls_tools)
        if not missing.startswith(text) or frame.text_complete or frame.ends_stream:
            return Frame(error="it was to repeat the answer before it continues it, and sent something else")
        self._missing = missing[len(text) :]
        return None if text or frame.thinking else frame
