"""Makes the requests to the node that continues a cut answer: a question first, if needed, then the request. Pure.

The model's template decides whether a node continues a last message of the assistant. So the node may be asked to
render the prompt first. The strategy that its answer shows is remembered by node and model.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from enum import StrEnum
from functools import cached_property

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.received_text import ReceivedText
from gpumesh.backends.continuation.stream_format import ContinuationCall, JsonObject, PartialAnswer, StreamFormat
from gpumesh.backends.continuation.stream_formats import continuation_format_for
from gpumesh.topology import BackendKind

# The memory that a parsed request may take (``safe_json.estimate_memory``), in bytes: as much as 16 MiB of images, or
# 300,000 values.
REQUEST_COST = 64 << 20


class ContinuationStrategy(StrEnum):
    """How a model's template lets an answer be continued."""

    ASSISTANT_LAST = "assistant-last"
    RAW = "raw"


ContinuationStrategies = MutableMapping[tuple[str, str], ContinuationStrategy]
"""The known strategies by node and model: on two nodes, models of one name may have different templates. Keep one
mapping for the gateway's life."""


class ContinuationPlanner:
    """Plans the continuation of one request. ``reserve_bytes`` returns whether this many more bytes may be held for the
    request. The request is parsed only after a cut."""

    def __init__(
        self,
        path: str,
        request_body: bytes,
        form: StreamFormat,
        strategies: ContinuationStrategies,
        reserve_bytes: Callable[[int], bool],
    ) -> None:
        self._path = path
        self._request_body = request_body
        self._form = form
        self._next_form = form
        self._strategies = strategies
        self._reserve_bytes = reserve_bytes
        self._prompt: str | None = None

    @cached_property
    def _is_affordable(self) -> bool:
        """Whether there is enough memory to parse the request."""
        cost = safe_json.estimate_memory(self._request_body, REQUEST_COST)
        return cost is not None and self._reserve_bytes(cost)

    @cached_property
    def _request(self) -> JsonObject:
        return (safe_json.parse_object(self._request_body) if self._is_affordable else None) or {}

    @property
    def _model(self) -> str:
        return safe_json.as_text(self._request.get("model")) or ""

    @property
    def token_budget(self) -> int | None:
        """The client's limit for the tokens of the answer; ``None`` without one."""
        return self._form.budget(self._request)

    def refusal(self, received: ReceivedText) -> str | None:
        """Why no node can continue the received text; ``None`` if one can."""
        if not received.started or (not received.tokens and not received.calls_tools and received.keeps):
            return None  # the client has no text yet: the request is sent anew
        if self._form.supports_continuation and not received.keeps:
            return "it is too long to be held"
        if received.calls_tools:
            return "it calls tools"
        if received.thinking_texts and not received.texts:
            return "the model was still thinking"
        if received.repeats_itself:
            return "it repeats itself"
        if not self._is_affordable:
            return "its request is too large to be taken apart for another node"
        return self._form.continuation_refusal(self._request)

    def render_call(self, node: str, kind: BackendKind, partial_answer: PartialAnswer) -> HttpCall | None:
        """The question to the node that will continue; ``None`` if it need not be asked."""
        strategy = self._strategies.get((node, self._model))
        form = continuation_format_for(self._path, kind)
        if type(form) is not type(self._next_form):
            self._prompt = None  # a server of another kind rendered it
        self._next_form = form
        strategy_is_ready = strategy is ContinuationStrategy.ASSISTANT_LAST or (
            strategy is ContinuationStrategy.RAW and self._prompt is not None
        )
        if strategy_is_ready or not self._depends_on_template(form, partial_answer):
            return None
        return form.render_call(self._request, partial_answer.thinking)

    def apply_rendered_prompt(self, node: str, status: int, body: bytes) -> None:
        """Takes the node's answer to ``render_call``. Without a usable answer the most common strategy stays: assistant
        last."""
        document = (safe_json.parse_object(body) if status == 200 else None) or {}
        rendered = self._next_form.read_rendered_prompt(document)
        if rendered is None:
            return
        if rendered.closes_turn:
            self._strategies[node, self._model] = ContinuationStrategy.RAW
            self._prompt = rendered.text
        else:
            self._strategies[node, self._model] = ContinuationStrategy.ASSISTANT_LAST

    def next_call(self, node: str, kind: BackendKind, partial_answer: PartialAnswer) -> ContinuationCall | str | None:
        """The request to the node that will continue, or the reason why no node can. ``None``: it is not known how this
        node's model continues, but another node may be able to."""
        form = continuation_format_for(self._path, kind)
        strategy = self._strategies.get((node, self._model))
        if strategy is not ContinuationStrategy.RAW or not self._depends_on_template(form, partial_answer):
            refusal = form.assistant_message_refusal(self._request)
            return refusal or form.continue_assistant_message(self._request, partial_answer)
        refusal = form.raw_prompt_refusal(self._request)
        if refusal is not None:
            return refusal
        return None if self._prompt is None else form.continue_raw_prompt(self._request, partial_answer, self._prompt)

    def _depends_on_template(self, form: StreamFormat, partial_answer: PartialAnswer) -> bool:
        """Whether the model's template decides how the text is continued."""
        return bool(partial_answer.text) and form.uses_template(self._request)
