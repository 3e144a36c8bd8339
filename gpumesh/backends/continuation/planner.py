"""``ContinuationPlanner`` makes the requests to the node that continues a cut answer. Pure.

The model's template decides whether a node continues a last message of the assistant. So the node may first be asked to
render the prompt. The rendered prompt shows the strategy for this template, which is remembered by node and model.
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

    ASSISTANT_LAST = "assistant-last"  # the partial answer is a last message of the assistant
    RAW = "raw"  # the partial answer is text after the rendered prompt


ContinuationStrategies = MutableMapping[tuple[str, str], ContinuationStrategy]
"""The known strategies by node and model: on two nodes, models of one name may have different templates. Keep one
mapping for the gateway's life."""


class ContinuationPlanner:
    """Plans the continuation of one request. ``reserve_bytes`` reserves this many bytes for the request, and returns
    whether there is room. The request is parsed only after a cut."""

    def __init__(
        self,
        path: str,
        request_body: bytes,
        stream_format: StreamFormat,
        strategies: ContinuationStrategies,
        reserve_bytes: Callable[[int], bool],
    ) -> None:
        self._path = path
        self._request_body = request_body
        self._client_format = stream_format
        self._upstream_format = stream_format
        self._strategies = strategies
        self._reserve_bytes = reserve_bytes
        self._prompt: str | None = None  # rendered by a server, for the strategy RAW

    @cached_property
    def _is_affordable(self) -> bool:
        """Whether there is enough memory to parse the request. At the first call, the memory is reserved."""
        cost = safe_json.estimate_memory(self._request_body, REQUEST_COST)
        return cost is not None and self._reserve_bytes(cost)

    @cached_property
    def _request(self) -> JsonObject:
        """The parsed request; empty if it is no JSON object, or too large to be parsed."""
        if not self._is_affordable:
            return {}
        return safe_json.parse_object(self._request_body) or {}

    @property
    def _model(self) -> str:
        """The model that the request names; empty if it names none."""
        return safe_json.as_text(self._request.get("model")) or ""

    @property
    def token_budget(self) -> int | None:
        """The client's limit for the tokens of the answer; ``None`` without one."""
        return self._client_format.token_budget(self._request)

    def refusal(self, received: ReceivedText) -> str | None:
        """Why no node can continue the received text; ``None`` if a node can."""
        # Only if the text is kept, its absence here means that the client has none.
        has_no_text = received.keeps and not received.tokens and not received.calls_tools
        if not received.started or has_no_text:
            return None  # the request is sent anew
        if self._client_format.supports_continuation and not received.keeps:
            return "it is too long to be held"
        if received.calls_tools:
            return "it calls tools"
        if received.thinking_texts and not received.texts:
            return "the model was still thinking"
        if received.repeats_itself:
            return "it repeats itself"
        if not self._is_affordable:
            return "its request is too large to be taken apart for another node"
        return self._client_format.continuation_refusal(self._request)

    def render_call(self, node: str, kind: BackendKind, partial_answer: PartialAnswer) -> HttpCall | None:
        """The request for the rendered prompt, to the node that will continue; ``None`` if no prompt is needed."""
        strategy = self._strategies.get((node, self._model))
        stream_format = continuation_format_for(self._path, kind)
        if type(stream_format) is not type(self._upstream_format):
            self._prompt = None  # a server of another kind rendered this prompt, so it is of no use here
        self._upstream_format = stream_format
        needs_prompt = strategy is None or (strategy is ContinuationStrategy.RAW and self._prompt is None)
        if not needs_prompt or not self._depends_on_template(stream_format, partial_answer):
            return None
        return stream_format.render_call(self._request, partial_answer.thinking)

    def apply_rendered_prompt(self, node: str, status: int, body: bytes) -> None:
        """Remembers the strategy that the node's answer to ``render_call`` shows. If the answer is not usable, the most
        common strategy is used: ASSISTANT_LAST."""
        document = (safe_json.parse_object(body) if status == 200 else None) or {}
        rendered = self._upstream_format.read_rendered_prompt(document)
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
        stream_format = continuation_format_for(self._path, kind)
        strategy = self._strategies.get((node, self._model))
        is_raw = strategy is ContinuationStrategy.RAW and self._depends_on_template(stream_format, partial_answer)
        if not is_raw:
            refusal = stream_format.assistant_message_refusal(self._request)
            return refusal or stream_format.continue_assistant_message(self._request, partial_answer)
        refusal = stream_format.raw_prompt_refusal(self._request)
        if refusal is not None:
            return refusal
        if self._prompt is None:
            return None
        return stream_format.continue_raw_prompt(self._request, partial_answer, self._prompt)

    def _depends_on_template(self, stream_format: StreamFormat, partial_answer: PartialAnswer) -> bool:
        """Whether the model's template decides how the text is continued. Without a text there is nothing to
        continue."""
        return bool(partial_answer.text) and stream_format.uses_template(self._request)
