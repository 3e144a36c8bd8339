"""``ContinuationPlanner`` makes the requests to the node that continues a cut answer. Pure.

The planner never assumes how a node continues an answer: it asks the node. If the node renders the prompt, the partial
answer is sent as text after the prompt. If this is not possible (images, a server that renders no prompts), the partial
answer is sent as a last message of the assistant, but only to a model that is known to continue such a message. Whether
it does so is asked once for each node and model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from gpumesh.backends import safe_json
from gpumesh.backends.base import HttpCall
from gpumesh.backends.continuation.prefill import ContinuationStrategy, ProbeReply, judge_prefill, read_probe_reply
from gpumesh.backends.continuation.received_text import ReceivedText
from gpumesh.backends.continuation.stream_format import (
    ContinuationCall,
    JsonObject,
    PartialAnswer,
    RenderedPrompt,
    StreamFormat,
    client_began_answer,
    fold_messages,
)
from gpumesh.backends.continuation.stream_formats import continuation_format_for
from gpumesh.topology import BackendKind

# The memory that a parsed request may take (``safe_json.estimate_memory``), in bytes: as much as 16 MiB of images, or
# 300,000 values. No step over such a request takes more than 40 ms, in which no other request is served.
REQUEST_COST = 64 << 20
HTTP_OK = 200
# Known to continue a last message of the assistant.
_ASSISTANT_STRATEGIES = (ContinuationStrategy.ASSISTANT_LAST, ContinuationStrategy.ASSISTANT_REPEATED)


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
        self._strategies = strategies
        self._reserve_bytes = reserve_bytes
        self._questions = _Questions("", stream_format, 0)  # to the node that will continue
        # By node. A node keeps its kind, and so the API of its prompt.
        self._rendered_prompts: dict[str, RenderedPrompt] = {}

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
        request = safe_json.parse_object(self._request_body) or {}
        return fold_messages(request) if self._path.startswith("/api/") else request

    def parse_request(self) -> Iterator[None]:
        """Does the long work of the first cut, and yields after each step, so that the caller can let other requests
        run. Without this call, the first method that needs the parsed request does all of it at once."""
        if self._is_affordable:
            yield
            if self._request:
                yield

    @property
    def _model(self) -> str:
        """The model that the request names; empty if it names none."""
        return safe_json.as_text(self._request.get("model")) or ""

    @property
    def token_budget(self) -> int | None:
        """The client's limit for the tokens of the answer; ``None`` without one."""
        return self._client_format.token_budget(self._request)

    def is_missing_choices(self, received: ReceivedText) -> bool:
        """Whether the client has asked for more choices than have come complete."""
        return received.finished_choices < self._client_format.choice_count(self._request)

    def refusal(self, received: ReceivedText) -> str | None:
        """Why no node can continue the received text; ``None`` if a node can."""
        # If no text is kept, the client may have text that is not in ``received``.
        has_no_text = received.keeps and not (received.tokens or received.calls_tools or received.has_other_content)
        if not received.started or has_no_text:
            return None  # the request is sent again from the start
        if self._client_format.supports_continuation and not received.keeps:
            return "it is too long to be held"
        if received.calls_tools:
            return "it calls tools"
        if received.has_other_choices:
            return "several answers at once cannot be continued"
        if received.thinking_texts and not received.texts:
            return "the model was still thinking"
        if received.has_other_content and (received.has_mixed_content or not received.texts):
            return "it holds more than text"
        if received.repeats_itself:
            return "it repeats itself"
        if not self._is_affordable:
            return "its request is too large to be taken apart for another node"
        refusal = self._client_format.continuation_refusal(self._request)
        if refusal is None and self._may_repeat_client_text(received):
            refusal = "the client began it, and the server may have repeated this beginning"
        return refusal

    def _may_repeat_client_text(self, received: ReceivedText) -> bool:
        """Whether the answer begins with the text with which the client began it. Then it is not known who has written
        this text: some servers repeat a last message of the assistant."""
        beginning = self._client_beginning
        if not beginning:
            return False
        text = "".join(received.texts)
        return bool(text) and (text.startswith(beginning) or beginning.startswith(text))

    # -- questions to the node that will continue --------------------------------------------------------------------

    def next_question(self, node: str, kind: BackendKind, partial_answer: PartialAnswer) -> HttpCall | None:
        """The next request that asks the node how to continue there; ``None`` if there is no further question.

        The first question is for the rendered prompt. The others find out whether the model continues a last message of
        the assistant. They are needed only if the partial answer cannot follow the rendered prompt."""
        if (node, partial_answer.cuts) != (self._questions.node, self._questions.cuts):
            stream_format = continuation_format_for(self._path, kind)
            self._questions = _Questions(node, stream_format, partial_answer.cuts)
        questions = self._questions
        stream_format = questions.stream_format
        is_known = self._strategies.get((node, self._model)) in _ASSISTANT_STRATEGIES
        if is_known or not partial_answer.text or not stream_format.uses_template(self._request):
            return None
        rendered = self._rendered_prompts.get(node)
        if rendered is None and not questions.has_asked_for_prompt:
            questions.has_asked_for_prompt = True
            render_call = stream_format.render_call(self._request, partial_answer.thinking)
            if render_call is not None:
                questions.awaits_prompt = True
                return render_call
        if rendered is not None:
            can_follow_prompt = stream_format.raw_prompt_refusal(self._request) is None
            if rendered.closes_turn or can_follow_prompt:
                return None
        if stream_format.assistant_message_refusal(self._request) is not None:
            return None
        calls = stream_format.prefill_calls(self._request)
        asked_count = len(questions.replies)
        return calls[asked_count] if asked_count < len(calls) else None

    def apply_reply(self, status: int, body: bytes) -> None:
        """Learns from the node's reply to the last question."""
        questions = self._questions
        stream_format = questions.stream_format
        if not questions.awaits_prompt:
            questions.replies.append(read_probe_reply(stream_format, body) if status == HTTP_OK else None)
            self._judge_replies(questions)
            return
        questions.awaits_prompt = False
        document = (safe_json.parse_object(body) if status == HTTP_OK else None) or {}
        rendered = stream_format.read_rendered_prompt(document)
        if rendered is not None:
            self._rendered_prompts[questions.node] = rendered
            if rendered.closes_turn:
                self._strategies[questions.node, self._model] = ContinuationStrategy.RAW

    def _judge_replies(self, questions: _Questions) -> None:
        """Remembers how the node treats a last message of the assistant, as soon as its replies show this."""
        rendered = self._rendered_prompts.get(questions.node)
        reply, unmarked_reply = (*questions.replies, None)[:2]  # ``None``: the second call was not made yet
        strategy = judge_prefill(
            reply, unmarked_reply, leaves_turn_open=rendered is not None and not rendered.closes_turn
        )
        if strategy is not None:
            self._strategies[questions.node, self._model] = strategy

    # -- the request that continues the answer -----------------------------------------------------------------------

    def next_call(self, node: str, kind: BackendKind, partial_answer: PartialAnswer) -> ContinuationCall | str | None:
        """The request to the node that will continue, or the reason why no node can. ``None``: it is not known how this
        node's model continues, but another node may be able to."""
        stream_format = continuation_format_for(self._path, kind)
        if not stream_format.uses_template(self._request):  # a raw prompt: the partial answer follows it
            return stream_format.continue_assistant_message(self._request, partial_answer)
        strategy = self._strategies.get((node, self._model))
        rendered = self._rendered_prompts.get(node)
        if strategy in _ASSISTANT_STRATEGIES or rendered is None:
            return self._assistant_message_call(stream_format, strategy, partial_answer)
        return self._raw_prompt_call(stream_format, rendered, partial_answer)

    def _assistant_message_call(
        self, stream_format: StreamFormat, strategy: ContinuationStrategy | None, partial_answer: PartialAnswer
    ) -> ContinuationCall | str | None:
        """The request with the partial answer as the last message of the assistant, if ``strategy`` says so."""
        refusal = stream_format.assistant_message_refusal(self._request)
        if refusal is not None:
            return refusal
        if strategy not in _ASSISTANT_STRATEGIES:
            return None
        call = stream_format.continue_assistant_message(self._request, partial_answer)
        if strategy is ContinuationStrategy.ASSISTANT_REPEATED:
            return replace(call, repeated_text=self._client_beginning + partial_answer.text)
        return call

    def _raw_prompt_call(
        self, stream_format: StreamFormat, rendered: RenderedPrompt, partial_answer: PartialAnswer
    ) -> ContinuationCall | str | None:
        """The request with the partial answer as text after the ``rendered`` prompt."""
        refusal = stream_format.raw_prompt_refusal(self._request)
        if refusal is not None:
            return f"its template closes the turn, and {refusal}" if rendered.closes_turn else None
        client_beginning = self._client_beginning
        if client_beginning and (rendered.closes_turn or not rendered.text.endswith(client_beginning)):
            return "its template closes the turn that the client began"
        return stream_format.continue_raw_prompt(self._request, partial_answer, rendered.text)

    @property
    def _client_beginning(self) -> str:
        """The text with which the client began the answer; empty if the client did not."""
        messages: Any = self._request.get("messages")
        return str(messages[-1]["content"]) if client_began_answer(messages) else ""


class _Questions:
    """The questions to the node that will continue after cut number ``cuts``. ``awaits_prompt``: the last question was
    for the prompt. ``replies``: the replies to the other questions; ``None`` for a reply that shows nothing."""

    def __init__(self, node: str, stream_format: StreamFormat, cuts: int) -> None:
        self.node = node
        self.stream_format = stream_format
        self.cuts = cuts
        self.has_asked_for_prompt = False
        self.awaits_prompt = False
        self.replies: list[ProbeReply | None] = []
