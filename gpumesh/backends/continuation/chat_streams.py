"""The formats of ``/v1/chat/completions``: how its streams are read, continued and ended, by kind of server. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.base import JSON_HEADERS, HttpCall
from gpumesh.backends.continuation.event_streams import (
    CHOICE_MARKS,
    DONE,
    EventStreamFormat,
    encode_event,
    event_data,
    read_choices,
    wanted_choices,
    with_choices,
)
from gpumesh.backends.continuation.ollama_streams import OllamaStreamFormat, raw_prompt_call
from gpumesh.backends.continuation.stream_format import (
    SENTINEL,
    ContinuationCall,
    Frame,
    JsonObject,
    PartialAnswer,
    TextPieces,
    append_answer,
    client_began_answer,
    collect_texts,
    continuation_note,
    find_strings,
    positive_count,
    probe_messages,
)
from gpumesh.text.printable import printable

# Members that give the answer a form, or let each of its tokens be told with more than its text. The rest of an answer
# would begin the form again. Servers have dozens of names for them: ``guided_choice``, ``structured_outputs`` …
_SHAPES_ANSWER = re.compile(
    r"\A(?:tools|functions|audio|modalities|regex|ebnf|suffix|prediction)\Z"
    r"|guided_|grammar|schema|structur|logprob|return_token"
)
# The limits for the tokens of an answer. The last is llama-server's own.
LIMIT_KEYS = ("max_completion_tokens", "max_tokens", "n_predict")
_TEXTS = re.compile(rb'"content"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')
_TEXT_MEMBERS = {"role", "content"}  # of a message that holds only text


class OpenAIChatFormat(EventStreamFormat):
    """The streams of ``/v1/chat/completions``. On this kind of server (Ollama) the model's template decides how an
    answer is continued."""

    supports_continuation = True
    _search_marks = staticmethod(CHOICE_MARKS.search)

    def read(self, frame: bytes) -> Frame:
        """Parses one event, with its text, its thinking, its tool calls and its choices."""
        event = super().read(frame)
        if event.document is None:
            return event
        text, thinking, delta = _read_texts(event.document)
        choices = read_choices(event.document)
        has_content = any(_has_content(choice) for choice in choices)
        calls_tools = bool(delta.get("tool_calls") or delta.get("function_call"))
        chat_frame = replace(
            event,
            text=text,
            thinking=thinking,
            has_content=has_content,
            calls_tools=calls_tools,
            has_other_content=has_content and not (text or thinking or calls_tools),
        )
        return with_choices(chat_frame, choices)

    def extract_texts(self, frames: bytes) -> TextPieces:
        """The texts of many events. Events with thinking are parsed one by one."""
        if b'"reasoning' not in frames:
            pieces = find_strings(_TEXTS, frames, frames.count(b"\n\n"))
            if pieces is not None:
                return pieces
        events = frames.split(b"\n\n") if b"\r" not in frames else self.frame_end_pattern.split(frames)
        # Nearly all events are one line "data: …"; 6 is the length of "data: ".
        data_of_events = [
            event[6:] if event.startswith(b"data: ") and b"\n" not in event else event_data(event)
            for event in events
            if event
        ]
        documents = safe_json.parse_objects([data for data in data_of_events if data])
        pairs = [_read_texts(document)[:2] for document in documents]  # [:2]: the text and the thinking
        has_other_content = any(
            not any(pair) and any(map(_has_content, read_choices(document)))
            for pair, document in zip(pairs, documents, strict=True)
        )
        return collect_texts(pairs, has_other_content=has_other_content)

    def continuation_refusal(self, request: JsonObject) -> str | None:
        """The reason if the request holds something that a continuation could not keep: tools, a grammar, several
        answers at once …"""
        for key, value in request.items():
            if value and _SHAPES_ANSWER.search(key) is not None:
                return f"an answer with `{printable(key, 40)}` cannot be continued"
        response_format = request.get("response_format")
        if isinstance(response_format, dict) and response_format.get("type") not in (None, "text"):
            return "an answer with `response_format` cannot be continued"
        if wanted_choices(request) > 1:
            return "several answers at once cannot be continued"
        if not isinstance(request.get("messages"), list):
            return "an answer to this kind of prompt cannot be continued"
        return None

    def token_budget(self, request: JsonObject) -> int | None:
        """The lowest of the limits for tokens that a request may hold; ``None`` if it holds none."""
        limits = [positive_count(request.get(key)) for key in LIMIT_KEYS]
        return min((limit for limit in limits if limit is not None), default=None)

    def choice_count(self, request: JsonObject) -> int:
        """The choices that the client wants."""
        return wanted_choices(request)

    def uses_template(self, request: JsonObject) -> bool:  # noqa: ARG002
        """``True``: the server renders every chat with the template."""
        return True

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        """Asks Ollama's own API for the rendered prompt. A server that does not know ``_debug_render_only`` generates
        an answer, so that is limited to one token."""
        messages = _as_native(request["messages"])
        if messages is None:
            return None
        body = _native_body(request) | {"messages": append_answer(messages, SENTINEL, "thinking", thinking)}
        body |= {"_debug_render_only": True, "stream": False, "options": _native_options(request) | {"num_predict": 1}}
        return HttpCall("POST", "/api/chat", safe_json.dump_compact(body), JSON_HEADERS)

    def raw_prompt_refusal(self, request: JsonObject) -> str | None:
        """The reason if the chat holds more than text."""
        if not _has_only_text(request["messages"]):
            return "not all of these messages can be told as text"
        return None

    def continue_raw_prompt(self, request: JsonObject, partial_answer: PartialAnswer, prompt: str) -> ContinuationCall:
        """A request to Ollama's own ``/api/generate`` for a raw prompt, because Ollama's ``/v1`` would apply the
        template to the prompt once more."""
        options, budget = _native_options(request), self.token_budget(request)
        if budget is not None:
            options["num_predict"] = budget - partial_answer.tokens
        body = {key: request[key] for key in ("model", "keep_alive") if key in request}
        call = raw_prompt_call(body, prompt + partial_answer.text, options)
        return ContinuationCall(call, OllamaAsOpenAIFormat(usage=wants_usage(request)))

    def prefill_calls(self, request: JsonObject) -> tuple[HttpCall, ...]:
        """One chat."""
        return (self._prefill_call(request, {}),)

    def _prefill_call(self, request: JsonObject, marks: JsonObject) -> HttpCall:
        """A short chat with these marks. Its answer has the figures of its tokens."""
        body = {key: request[key] for key in ("model", "keep_alive", "chat_template_kwargs") if key in request}
        body |= {"messages": probe_messages(), "max_tokens": 1, "stream": True, **marks}
        body["stream_options"] = {"include_usage": True}
        return HttpCall("POST", self._path, safe_json.dump_compact(body), JSON_HEADERS)

    def assistant_message_refusal(self, request: JsonObject) -> str | None:  # noqa: ARG002
        """``None``: a last message of the assistant can always be added."""
        return None

    def continue_assistant_message(self, request: JsonObject, partial_answer: PartialAnswer) -> ContinuationCall:
        """The request with the partial answer as its last message, and with lower limits for the tokens."""
        body = dict(request)
        body["messages"] = append_answer(
            list(request["messages"]), partial_answer.text, "reasoning_content", partial_answer.thinking
        )
        for key in LIMIT_KEYS:
            limit = positive_count(request.get(key))
            if limit is not None:
                body[key] = max(limit - partial_answer.tokens, 1)
        return ContinuationCall(HttpCall("POST", self._path, safe_json.dump_compact(body), JSON_HEADERS), self)

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:
        """The same chunk with the members that name the answer, and with the figures of the whole answer."""
        if frame.document is None:
            return DONE if frame.ends_stream else b""
        has_figures = isinstance(frame.document.get("usage"), dict) or isinstance(frame.document.get("timings"), dict)
        holds_only_role = not (frame.text or frame.thinking or frame.text_complete or has_figures)
        if holds_only_role and partial_answer.first_frame is not None:
            return b""  # each stream begins with such a frame, and the client has received one already
        document = _with_texts(frame) | _first_frame_members(partial_answer)
        if has_figures:
            document |= correct_figures(document, partial_answer)
        if has_figures or frame.text_complete:
            document["gpumesh"] = continuation_note(partial_answer)
        return encode_event(document)

    def closing_frames(self, reason: str, partial_answer: PartialAnswer) -> bytes:
        """The finish reason, unless the client has it, and the end mark."""
        if not reason:  # the client has received the frame with the finish reason
            return DONE
        return finish_events(partial_answer, reason, {})


class MarkedChatFormat(OpenAIChatFormat):
    """``/v1/chat/completions`` of a server that is not asked for a prompt. The request marks the message to continue.

    Without the mark, vLLM and SGLang start a new turn, and llama-server repeats the message. llama-server refuses to
    continue if the model could think first. So ``enable_thinking`` is off: the thinking before the partial answer, if
    any, is over.
    """

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:  # noqa: ARG002
        """No request: these servers do not render prompts, or their prompts are not needed."""
        return None

    def prefill_calls(self, request: JsonObject) -> tuple[HttpCall, ...]:
        """A chat with the mark, and the same without it."""
        open_end: JsonObject = {**without_thinking(request), "add_generation_prompt": False}
        marked = self._prefill_call(request, {**open_end, "continue_final_message": True})
        return marked, self._prefill_call(request, open_end)

    def assistant_message_refusal(self, request: JsonObject) -> str | None:
        """The reason if the client began the answer without a mark."""
        if client_began_answer(request["messages"]) and not request.get("continue_final_message"):
            return "the client began the turn, and servers differ in what that means"
        return None

    def continue_assistant_message(self, request: JsonObject, partial_answer: PartialAnswer) -> ContinuationCall:
        """The request with the partial answer as its last message, which is marked. vLLM would repeat the message for a
        client that has set ``echo``."""
        request = {key: value for key, value in request.items() if key != "echo"}
        marks = {"continue_final_message": True, "add_generation_prompt": False}
        return super().continue_assistant_message({**request, **marks, **without_thinking(request)}, partial_answer)


class AnyServerChatFormat(MarkedChatFormat):
    """``/v1/chat/completions`` of a server of unknown kind. It may be an Ollama, which knows no marks but renders the
    prompt. A server that does not know ``/api/chat`` answers 404."""

    def render_call(self, request: JsonObject, thinking: str) -> HttpCall | None:
        """Asks as for the prompt of an Ollama."""
        return OpenAIChatFormat.render_call(self, request, thinking)


class OllamaAsOpenAIFormat(OllamaStreamFormat):
    """Frames of ``/api/generate`` that continue an answer of ``/v1/chat/completions``."""

    def __init__(self, *, usage: bool) -> None:
        super().__init__(generate=True)
        self._usage = usage

    def translate(self, frame: Frame, partial_answer: PartialAnswer) -> bytes:
        """A line of ``/api/generate`` as chunks of a chat. The last line becomes the end of the stream."""
        out = encode_event(make_chunk(partial_answer, {"content": frame.text}, None)) if frame.text else b""
        if not frame.ends_stream or frame.document is None:
            return out
        reason = "length" if frame.document.get("done_reason") == "length" else "stop"
        counts = {
            "prompt_tokens": safe_json.as_count(frame.document.get("prompt_eval_count")) or 0,
            "completion_tokens": safe_json.as_count(frame.document.get("eval_count")) or 0,
        }
        return out + finish_events(partial_answer, reason, {"usage": counts} if self._usage else {})


def wants_usage(request: JsonObject) -> bool:
    """Whether the client asked for a last chunk with the number of tokens."""
    options = request.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def finish_events(partial_answer: PartialAnswer, reason: str, figures: JsonObject) -> bytes:
    """The end of a chat's stream: the chunk with the finish reason, a chunk with the figures if there are any, and
    ``[DONE]``."""
    out = encode_event(make_chunk(partial_answer, {}, reason) | {"gpumesh": continuation_note(partial_answer)})
    if figures:
        chunk = {**make_chunk(partial_answer, {}, None), "choices": [], **correct_figures(figures, partial_answer)}
        out += encode_event(chunk | {"gpumesh": continuation_note(partial_answer)})
    return out + DONE


def without_thinking(request: JsonObject) -> JsonObject:
    """The member of a request that switches thinking off in the model's template."""
    value = request.get("chat_template_kwargs")
    template_arguments = value if isinstance(value, dict) else {}
    return {"chat_template_kwargs": {**template_arguments, "enable_thinking": False}}


def _read_texts(document: JsonObject) -> tuple[str, str, JsonObject]:
    """Returns the text, the thinking, and the delta that holds the two texts, in this order. What the document does not
    have is empty."""
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    delta = choice.get("delta") if isinstance(choice, dict) else None
    if not isinstance(delta, dict):
        return "", "", {}
    thinking = safe_json.as_text(delta.get("reasoning_content")) or safe_json.as_text(delta.get("reasoning")) or ""
    return safe_json.as_text(delta.get("content")) or "", thinking, delta


def _has_content(choice: JsonObject) -> bool:
    """Whether a choice holds a part of the answer: anything but the role, which a server may send before it has read
    the prompt. Some servers send a ``message`` or a ``text`` instead of a ``delta``."""
    delta = choice.get("delta") or choice.get("message")
    has_part = isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")
    return has_part or bool(choice.get("text"))


def _with_texts(frame: Frame) -> dict[str, Any]:
    """A copy of the frame's document that has the frame's text: without the text that its server has repeated."""
    document = dict(frame.document or {})
    text, thinking, delta = _read_texts(document)
    if (text, thinking) != (frame.text, frame.thinking):
        kept = {key: value for key, value in delta.items() if key not in ("reasoning_content", "reasoning")}
        choice, *others = document["choices"]
        document["choices"] = [{**choice, "delta": {**kept, "content": frame.text}}, *others]
    return document


def _first_frame_members(partial_answer: PartialAnswer) -> dict[str, Any]:
    """The members that name the answer. They are the same in all chunks of the answer."""
    first = partial_answer.first_frame or {}
    return {key: first[key] for key in ("id", "object", "created", "model", "system_fingerprint") if key in first}


def make_chunk(partial_answer: PartialAnswer, delta: JsonObject, reason: str | None) -> dict[str, Any]:
    """A chunk of a chat's stream. ``reason`` is the finish reason; ``None`` before the last chunk."""
    return {**_first_frame_members(partial_answer), "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _native_body(request: JsonObject) -> dict[str, Any]:
    """The members of a request to ``/api/chat``, without its messages and its options."""
    body = {key: request[key] for key in ("model", "keep_alive") if key in request}
    effort = request.get("reasoning_effort")
    if isinstance(effort, str):
        body["think"] = False if effort == "none" else effort
    return body


def _native_options(request: JsonObject) -> dict[str, Any]:
    """The options that Ollama's ``/v1`` makes of a request. It sets temperature and top_p to 1.0 if the request does
    not give them; ``/api`` does not do so."""
    options = {"temperature": 1.0, "top_p": 1.0}
    for key in ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "stop"):
        if request.get(key) is not None:
            options[key] = request[key]
    return options


def _as_native(messages: list[Any]) -> list[Any] | None:
    """The messages that Ollama's ``/v1`` makes of a request's messages: each part of a content becomes a message. Parts
    that are not text (images, tool calls) are left out. ``None`` if a message is no object."""
    native_messages: list[Any] = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        content = message.get("content")
        if isinstance(content, str):  # nearly always, and there may be 100,000
            native_messages.append({"role": message.get("role"), "content": content})
            continue
        native_messages += [
            {"role": message.get("role"), "content": part["text"]}
            for part in safe_json.as_objects(content)
            if _is_text_part(part)
        ]
    return native_messages


def _has_only_text(messages: list[Any]) -> bool:
    """Whether ``_as_native`` leaves out nothing: no part that is not text, and no member besides role and content."""
    for message in messages:
        if not isinstance(message, dict) or not message.keys() <= _TEXT_MEMBERS:
            return False
        content = message.get("content")
        if not isinstance(content, str) and not all(map(_is_text_part, safe_json.as_objects(content))):
            return False
    return True


def _is_text_part(part: JsonObject) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def correct_figures(document: JsonObject, partial_answer: PartialAnswer) -> dict[str, Any]:
    """The figures of the whole answer. ``document`` holds those of the last attempt, which counted the partial answer
    as a part of its prompt. The durations of the earlier attempts were measured by our clock."""
    corrected: dict[str, Any] = {}
    usage, timings = document.get("usage"), document.get("timings")
    if isinstance(usage, dict):
        prompt = max((safe_json.as_count(usage.get("prompt_tokens")) or 0) - partial_answer.tokens, 0)
        tokens = (safe_json.as_count(usage.get("completion_tokens")) or 0) + partial_answer.tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        corrected["usage"] = {**usage, **counts}
    if isinstance(timings, dict):
        tokens = (safe_json.as_count(timings.get("predicted_n")) or 0) + partial_answer.tokens
        took_ms = (safe_json.as_number(timings.get("predicted_ms")) or 0.0) + partial_answer.spent_ms
        corrected["timings"] = {**timings, "predicted_n": tokens, "predicted_ms": took_ms}
        if tokens and took_ms:
            rates = {"predicted_per_token_ms": took_ms / tokens, "predicted_per_second": 1000.0 * tokens / took_ms}
            corrected["timings"] |= rates
    return corrected
