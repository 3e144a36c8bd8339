"""From a request to the answer that a stand-in gives, whichever API the request came by. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumesh.lab import text
from gpumesh.lab.profile import HostProfile, ModelProfile


class ApiError(Exception):
    """The request gets an error status and this message, in the form of its API."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for an answer. ``messages`` for chats; ``prompt`` for raw prompts; one of them is set."""

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
    """A whole answer, token by token: first thinking, then text. A tool call counts as the tokens of its JSON."""

    prompt: str
    thinking: tuple[str, ...]
    tokens: tuple[str, ...]
    tool: ToolCall | None
    done_reason: str

    @property
    def total(self) -> int:
        return len(self.thinking) + len(self.tokens)


def render_request(request: GenerationRequest) -> str:
    if request.messages is not None:
        return text.render_messages(request.messages, continues=request.model.continues)
    return request.prompt or ""


def plan_answer(request: GenerationRequest, profile: HostProfile) -> PlannedAnswer:
    """The answer of the model. Raises ApiError where Ollama would, before anything is generated."""
    prompt = render_request(request)
    options = request.options
    seed = options.get("seed")
    limit = options.get("num_predict")
    bound = limit if isinstance(limit, int) and limit >= 0 else None
    stop = options.get("stop") or ()
    generated = text.generate_text(
        prompt,
        model=request.model.name,
        seed=seed if isinstance(seed, int) else 0,
        num_predict=bound,
        length_range=profile.answer_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(str(mark) for mark in stop),
    )
    tool = _tool_call(request, generated.tokens)
    if tool is not None:
        tokens = text.split_tokens(
            json.dumps({"name": tool.name, "arguments": dict(tool.arguments)}, ensure_ascii=False)
        )
        generated = _bounded(tokens, bound)
        tool = tool if generated.done_reason == "stop" else None
    elif request.format:
        words = [token.strip() for token in generated.tokens] or ["nothing"]
        value = (
            {"answer": " ".join(words[:12])}
            if request.format == "json"
            else text.make_schema_example(request.format, words)
        )
        generated = _bounded(text.split_tokens(json.dumps(value, ensure_ascii=False)), bound)
    thinking: tuple[str, ...] = ()
    if _thinks(request) and not prompt.endswith("</think>"):
        thinking = text.generate_text(f"{prompt}<think>", model=request.model.name, num_predict=12).tokens
    return PlannedAnswer(prompt, thinking, generated.tokens, tool, generated.done_reason)


def _thinks(request: GenerationRequest) -> bool:
    """On by default where the model can; asked of another model it is an error."""
    if request.think and not request.model.thinking:
        raise ApiError(400, f'"{request.name}" does not support thinking')
    continued = bool(request.messages and request.messages[-1].get("role") == "assistant")
    return request.model.thinking and request.think is not False and request.messages is not None and not continued


def _tool_call(request: GenerationRequest, words: tuple[str, ...]) -> ToolCall | None:
    """The first of the tools is called whenever the user has the last word."""
    if not request.tools or not request.messages or request.messages[-1].get("role") != "user":
        return None
    if not request.model.tools:
        raise ApiError(400, f"registry.ollama.ai/library/{request.name} does not support tools")
    function = request.tools[0].get("function") or request.tools[0]
    schema = function.get("parameters") or function.get("input_schema") or {}
    value = text.make_schema_example(schema, [word.strip() for word in words])
    return ToolCall(str(function.get("name", "tool")), value if isinstance(value, dict) else {})


def _bounded(tokens: tuple[str, ...], bound: int | None) -> text.GeneratedText:
    if bound is not None and len(tokens) > bound:
        return text.GeneratedText(tokens[:bound], "length")
    return text.GeneratedText(tokens, "stop")
