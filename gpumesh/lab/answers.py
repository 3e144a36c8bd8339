"""Plans the answer of a stand-in to a request, for all APIs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumesh.lab import text
from gpumesh.lab.profile import HostProfile, ModelProfile


class ApiError(Exception):
    """The answer to the request is this status and this message, in the form of the request's API."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for an answer. A chat has ``messages``, a raw prompt has ``prompt``: one of the two is set."""

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
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlannedAnswer:
    """A whole answer as tokens: first ``thinking``, then ``tokens`` of text. A tool call's tokens are those of its
    JSON."""

    prompt: str
    thinking: tuple[str, ...]
    tokens: tuple[str, ...]
    tool: ToolCall | None
    done_reason: str

    @property
    def total(self) -> int:
        """Number of tokens."""
        return len(self.thinking) + len(self.tokens)


def render_request(request: GenerationRequest) -> str:
    if request.messages is not None:
        return text.render_messages(request.messages, continues=request.model.continues)
    return request.prompt or ""


def plan_answer(request: GenerationRequest, profile: HostProfile) -> PlannedAnswer:
    """The answer of the model. Raises ApiError where Ollama refuses a request before it generates."""
    prompt = render_request(request)
    options = request.options
    seed = options.get("seed")
    num_predict = options.get("num_predict")
    limit = num_predict if isinstance(num_predict, int) and num_predict >= 0 else None
    stop = options.get("stop") or ()
    generated = text.generate_text(
        prompt,
        model=request.model.name,
        seed=seed if isinstance(seed, int) else 0,
        num_predict=limit,
        length_range=profile.answer_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(str(mark) for mark in stop),
    )
    tool = _plan_tool_call(request, generated.tokens)
    if tool is not None:
        tokens = text.split_tokens(
            json.dumps({"name": tool.name, "arguments": dict(tool.arguments)}, ensure_ascii=False)
        )
        generated = _cut_at_limit(tokens, limit)
        tool = tool if generated.done_reason == "stop" else None
    elif request.format:
        words = [token.strip() for token in generated.tokens] or ["nothing"]
        document = (
            {"answer": " ".join(words[:12])}
            if request.format == "json"
            else text.make_schema_example(request.format, words)
        )
        generated = _cut_at_limit(text.split_tokens(json.dumps(document, ensure_ascii=False)), limit)
    thinking: tuple[str, ...] = ()
    if _should_think(request) and not prompt.endswith("</think>"):
        thinking = text.generate_text(f"{prompt}<think>", model=request.model.name, num_predict=12).tokens
    return PlannedAnswer(prompt, thinking, generated.tokens, tool, generated.done_reason)


def _should_think(request: GenerationRequest) -> bool:
    """Whether the model thinks first. A thinking model does so by default. Raises ApiError if another model is asked to
    think."""
    if request.think and not request.model.thinking:
        raise ApiError(400, f'"{request.name}" does not support thinking')
    continues_answer = bool(request.messages and request.messages[-1].get("role") == "assistant")
    thinks_by_default = request.model.thinking and request.messages is not None and not continues_answer
    return thinks_by_default and request.think is not False


def _plan_tool_call(request: GenerationRequest, answer_tokens: tuple[str, ...]) -> ToolCall | None:
    """A call of the first tool if the last message is the user's; otherwise ``None``. ``answer_tokens`` become the
    arguments' texts."""
    if not request.tools or not request.messages or request.messages[-1].get("role") != "user":
        return None
    if not request.model.tools:
        raise ApiError(400, f"registry.ollama.ai/library/{request.name} does not support tools")
    function = request.tools[0].get("function") or request.tools[0]
    schema = function.get("parameters") or function.get("input_schema") or {}
    arguments = text.make_schema_example(schema, [token.strip() for token in answer_tokens])
    return ToolCall(str(function.get("name", "tool")), arguments if isinstance(arguments, dict) else {})


def _cut_at_limit(tokens: tuple[str, ...], limit: int | None) -> text.GeneratedText:
    if limit is not None and len(tokens) > limit:
        return text.GeneratedText(tokens[:limit], "length")
    return text.GeneratedText(tokens, "stop")
