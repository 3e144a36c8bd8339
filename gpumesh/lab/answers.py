"""Plans the answer of a simulated server to a request, for all APIs: text, thinking, tool call or JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumesh.lab import text
from gpumesh.lab.profile import HostProfile, ModelProfile

JSON_WORDS = 12  # words of the answer to a request for any JSON: its length does not matter
THINKING_TOKENS = 12  # tokens of thinking, in each answer that begins with thinking


class ApiError(Exception):
    """Refuses a request: the answer is this HTTP status and this message, in the form of the request's API."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for an answer, the same for all APIs. A chat has ``messages``; otherwise ``prompt`` is a raw prompt.

    ``options``, ``keep_alive``, ``think`` and ``format`` are as in Ollama's API. ``tools`` are as in the API of the
    request, because each API has its own form.
    """

    model: ModelProfile
    name: str
    """The model's name as the client wrote it; answers repeat it."""
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    keep_alive: object = None
    think: object = None
    tools: Sequence[Mapping[str, Any]] = ()
    format: object = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the model: the tool's name and the arguments by name."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlannedAnswer:
    """A whole answer as tokens: first ``thinking``, then ``tokens`` of text.

    If ``tool`` is set, the answer is a tool call, and ``tokens`` are those of its JSON. ``prompt`` is the rendered
    prompt. ``done_reason`` is ``stop``, or ``length`` if a limit has cut the answer.
    """

    prompt: str
    thinking: tuple[str, ...]
    tokens: tuple[str, ...]
    tool: ToolCall | None
    done_reason: str

    @property
    def total(self) -> int:
        """The number of all tokens, those of thinking too."""
        return len(self.thinking) + len(self.tokens)


def render_request(request: GenerationRequest) -> str:
    """The prompt that the model gets: a chat as its template renders it, or the raw prompt itself."""
    if request.messages is not None:
        return text.render_messages(request.messages, continues=request.model.continues)
    return request.prompt or ""


def plan_answer(request: GenerationRequest, profile: HostProfile) -> PlannedAnswer:
    """Plans the whole answer of the request's model. Raises ApiError if Ollama would refuse the request.

    The answer is a tool call, a JSON document (``request.format``) or text. Thinking may come first.
    """
    prompt = render_request(request)
    num_predict = request.options.get("num_predict")  # negative: no limit
    limit = num_predict if isinstance(num_predict, int) and num_predict >= 0 else None
    answer = _generate_text(request, prompt, limit, profile.answer_tokens)
    tool = _plan_tool_call(request, answer.tokens)
    if tool is not None:
        answer = _json_answer({"name": tool.name, "arguments": dict(tool.arguments)}, limit)
        if answer.done_reason == "length":
            tool = None  # an incomplete call is no call: the client gets its tokens as text
    elif request.format:
        words = [token.strip() for token in answer.tokens] or ["nothing"]
        if request.format == "json":
            answer = _json_answer({"answer": " ".join(words[:JSON_WORDS])}, limit)
        else:
            answer = _json_answer(text.make_schema_example(request.format, words), limit)
    thinking: tuple[str, ...] = ()
    thinking_has_ended = prompt.endswith("</think>")  # the client's prompt holds the thinking already
    if _should_think(request) and not thinking_has_ended:
        thought = text.generate_text(f"{prompt}<think>", model=request.model.name, num_predict=THINKING_TOKENS)
        thinking = thought.tokens
    return PlannedAnswer(prompt, thinking, answer.tokens, tool, answer.done_reason)


def _generate_text(
    request: GenerationRequest, prompt: str, limit: int | None, length_range: tuple[int, int]
) -> text.GeneratedText:
    """Generates text with the request's ``seed`` and ``stop``: at most ``limit`` tokens (``None``: no limit).

    ``length_range`` are the least and the greatest number of words of an answer without a limit.
    """
    seed = request.options.get("seed")
    stop = request.options.get("stop") or ()
    return text.generate_text(
        prompt,
        model=request.model.name,
        seed=seed if isinstance(seed, int) else 0,
        num_predict=limit,
        length_range=length_range,
        stop=(stop,) if isinstance(stop, str) else tuple(str(sequence) for sequence in stop),
    )


def _json_answer(document: Any, limit: int | None) -> text.GeneratedText:
    """The document's JSON as tokens, at most ``limit`` tokens (``None``: no limit)."""
    tokens = text.split_tokens(json.dumps(document, ensure_ascii=False))
    if limit is not None and len(tokens) > limit:
        return text.GeneratedText(tokens[:limit], "length")
    return text.GeneratedText(tokens, "stop")


def _should_think(request: GenerationRequest) -> bool:
    """Whether the model thinks before its answer. A thinking model thinks in a chat, unless ``think`` is false.

    It thinks neither for a raw prompt, nor when it continues an answer. Raises ApiError if the request asks for
    thinking, but the model cannot think.
    """
    if request.think and not request.model.thinking:
        raise ApiError(400, f'"{request.name}" does not support thinking')
    continues_answer = bool(request.messages and request.messages[-1].get("role") == "assistant")
    thinks_by_default = request.model.thinking and request.messages is not None and not continues_answer
    return thinks_by_default and request.think is not False


def _plan_tool_call(request: GenerationRequest, answer_tokens: tuple[str, ...]) -> ToolCall | None:
    """Plans a call of the request's first tool, if the last message is the user's.

    Returns ``None`` if the request has no tool, or if its last message is another one: after a tool's result, the model
    answers with text. ``answer_tokens`` become the texts in the call's arguments. Raises ApiError if the model cannot
    use tools.
    """
    if not request.tools or not request.messages or request.messages[-1].get("role") != "user":
        return None
    if not request.model.tools:
        raise ApiError(400, f"registry.ollama.ai/library/{request.name} does not support tools")
    tool = request.tools[0]
    function = tool.get("function") or tool  # OpenAI's chats and Ollama have ``function``
    schema = function.get("parameters") or function.get("input_schema") or {}  # ``input_schema``: Anthropic's
    arguments = text.make_schema_example(schema, [token.strip() for token in answer_tokens])
    return ToolCall(str(function.get("name", "tool")), arguments if isinstance(arguments, dict) else {})
