"""How another node goes on with an answer that was cut: what it is asked, and what it is sent. Pure.

Whether a node continues a last message of the assistant depends on its model's template. So the node may be asked to
render the prompt first; what its answer shows is remembered by node and model.
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

# The memory that a request may cost when it is taken apart for another node (``safe_json.estimate_memory``): that of
# 16 MiB of images, or of 300,000 values.
REQUEST_COST = 64 << 20


class ContinuationStrategy(StrEnum):
    """How a model's template lets an answer be continued."""

    ASSISTANT_LAST = "assistant-last"
    RAW = "raw"


ContinuationStrategies = MutableMapping[tuple[str, str], ContinuationStrategy]
"""What is known, by node and model: one name may be two templates. Keep one mapping for the gateway's life."""


class ContinuationPlanner:
    """For one request. ``reserve_bytes`` says whether so many bytes more may be held for it. The request is taken apart
    only after a cut."""

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
        """Whether there is room to take the request apart."""
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
        """How many tokens the client allows at most."""
        return self._form.budget(self._request)

    def refusal(self, received: ReceivedText) -> str | None:
        """Why no node can go on with what the client has received; ``None`` where one can."""
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
        """The question to the node that will go on; ``None`` when nothing need be asked."""
        strategy = self._strategies.get((node, self._model))
        form = continuation_format_for(self._path, kind)
        if type(form) is not type(self._next_form):
            self._prompt = None  # another kind of server rendered it
        self._next_form = form
        is_known = strategy is ContinuationStrategy.ASSISTANT_LAST or (
            strategy is ContinuationStrategy.RAW and self._prompt is not None
        )
        if is_known or not self._depends_on_template(form, partial_answer):
            return None
        return form.render_call(self._request, partial_answer.thinking)

    def apply_rendered_prompt(self, node: str, status: int, body: bytes) -> None:
        """The answer to ``render_call``. Where it says nothing, the most common strategy is left: assistant last."""
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
        """What to send to the node that will go on, or why it cannot. ``None``: this node did not say how; another
        may."""
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
