"""``ChatStream``: a chat through the mesh, as chunks of text, the same for servers of every kind."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

from gpumesh.backends.base import ChatRequest, Chunk, FrameReader, HttpCall, Message, ServerCounters
from gpumesh.backends.dialects import DIALECTS
from gpumesh.balancer.base import Demand, Priority
from gpumesh.balancer.models.load_options import read_load_options
from gpumesh.balancer.prefixes import PromptHasher
from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN
from gpumesh.errors import BackendStatus, ModelMissing, NoNodeError, ServersFailed
from gpumesh.mesh.requests.answer import Answer
from gpumesh.topology import BackendKind

_MESSAGE_FORM = 'a text, or a list of dictionaries such as {"role": "user", "content": "hi"}, or of gpumesh.Message'


def read_request(request: object, messages: object) -> ChatRequest:
    """The request of a chat: ``request`` is one already, or the name of a model. Raises TypeError and ValueError."""
    if isinstance(request, str):
        return ChatRequest(request, read_messages(messages))
    if isinstance(request, ChatRequest):
        return request
    raise TypeError(f"a chat begins with the name of a model, not {type(request).__name__}")


def read_messages(messages: object) -> tuple[Message, ...]:
    """The messages of a chat: a text is one message of the user. Raises TypeError and ValueError for anything but a
    role, a content and images (in base64) in each message."""
    if isinstance(messages, str):
        return (Message("user", messages),)
    if isinstance(messages, bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f"messages are {_MESSAGE_FORM}, not {type(messages).__name__}")
    return tuple(_read_message(message, number) for number, message in enumerate(messages))


def _read_message(message: object, number: int) -> Message:
    """Reads a message of ``Mesh.chat``: a Message, a mapping, or an object with such attributes. ``number``: its place,
    for errors. Raises TypeError and ValueError."""
    if isinstance(message, Message):
        return message
    known = ("role", "content", "images")
    if isinstance(message, Mapping):
        values = [message.get(name) for name in known]
        further = [name for name in message if name not in known]
    else:
        values = [getattr(message, name, None) for name in known]
        further = [name for name in ("tool_calls", "tool_name") if getattr(message, name, None)]
    if further:
        hint = "gpumesh.connect() has a chat with tools"
        raise ValueError(f"messages[{number}] has {further[0]!r}, which Mesh.chat does not send; {hint}")
    role, content, images = values
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError(f"messages[{number}] has no role or no content that is a text; messages are {_MESSAGE_FORM}")
    images = images or ()
    if isinstance(images, str) or not all(isinstance(image, str) for image in images):
        raise TypeError(
            f"the images of messages[{number}] are a list of base64 texts; gpumesh.connect() also takes files"
        )
    return Message(role, content, tuple(images))


def chat_demand(
    request: ChatRequest, hasher: PromptHasher, *, node: str | None, priority: Priority, session: str | None
) -> Demand:
    """The demand of a chat. It knows the prompt, so that the next turn of a conversation goes to the node that has its
    beginning in memory."""
    key = read_load_options(request.options).residency_key(request.model)
    texts = [f"{message.role}\n{message.content}\n" for message in request.messages]
    prompt = "".join(texts).encode(errors="replace")
    return Demand(
        model=request.model,
        node=node,
        priority=priority,
        session=session,
        prompt_tokens=int(len(prompt) / BYTES_PER_TOKEN),
        residency=key,
        prompt=hasher.hash_prompt(key, prompt),
    )


class SendRequest(Protocol):
    """``Mesh.send``, as far as a chat uses it."""

    def __call__(
        self, demand: Demand, calls: Mapping[BackendKind, HttpCall], *, timeout_s: float, resume: bool
    ) -> Awaitable[Answer]: ...


class ChatStream:
    """The answer to one chat, as an async iterator of chunks and an async context manager. The request is sent at the
    first iteration, or on entry to the context.

    ``node``, ``attempts`` and ``queue_ms`` are known from the first chunk on, ``counters`` after the last chunk."""

    def __init__(
        self, send: SendRequest, request: ChatRequest, demands: Sequence[Demand], timeout_s: float, *, resume: bool
    ) -> None:
        """``demands``: the demanded model, then the models that take its place if no node can serve it."""
        self._send = send
        self._request = request
        self._demands = demands
        self._timeout_s = timeout_s
        self._resume = resume
        self._answer: Answer | None = None
        self._reader: FrameReader | None = None
        self._chunks: deque[Chunk] = deque()
        self._ended = False  # the final chunk was returned
        self.counters: ServerCounters | None = None

    def __repr__(self) -> str:
        if self._ended:
            phase = "ended"
        elif self._answer is None:
            phase = "not started"
        else:
            phase = f"from {self.node}"
        return f"<ChatStream {self._request.model} {phase}>"

    @property
    def answer(self) -> Answer | None:
        """The answer, with what is counted of it; ``None`` until it has begun."""
        return self._answer

    @property
    def node(self) -> str | None:
        """The name of the node that answers."""
        return None if self._answer is None else self._answer.node

    @property
    def attempts(self) -> int:
        """How many times the request was sent to a node, until a node answered."""
        return 0 if self._answer is None else self._answer.attempts

    @property
    def queue_ms(self) -> float:
        """How long the request waited for a slot."""
        return 0.0 if self._answer is None else self._answer.queue_ms

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the request, even if its answer is not complete."""
        if self._answer is not None:
            await self._answer.aclose()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """Returns the next chunk. Raises StreamCut if the answer was cut and could not be continued, and at the first
        chunk the errors of ``_start``."""
        if self._answer is None:
            await self._start()
        answer, reader = self._answer, self._reader
        assert answer is not None, "the chat has started without an answer"
        assert reader is not None, "the chat has started without a reader"
        while not self._chunks:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._add_chunks(reader.feed(await anext(answer)))
            except StopAsyncIteration:  # the answer has no more bytes
                self._ended = True
                self._add_chunks(reader.close())  # StreamCut comes from here
            except BaseException:
                # A frame is not readable, or the caller was cancelled: nobody will read the rest.
                await answer.aclose()
                raise
        return self._chunks.popleft()

    def _add_chunks(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._chunks.append(chunk)
            if chunk.counters is not None:
                self.counters = chunk.counters

    async def _start(self) -> None:
        """Sends the request and waits for the head of the answer. Raises the errors of ``Mesh.send``; for an answer
        with status 404 ModelMissing, and for any other error BackendStatus."""
        answer = await self._send_to_any_model()
        dialect = DIALECTS[answer.kind]
        if answer.status >= 400:
            body = await answer.read()
            reason = dialect.error_text(answer.status, body)
            if answer.status == 404:
                raise ModelMissing(self._request.model, hint=f"{answer.node} says: {reason}")
            raise BackendStatus(reason, status=answer.status, body=body, node=answer.node)
        self._reader = dialect.create_reader(stream=self._request.stream)
        self._answer = answer

    async def _send_to_any_model(self) -> Answer:
        """Sends the request for the first of its models that a node can serve. Raises the errors of ``Mesh.send`` for
        the first of them."""
        first_error: NoNodeError | None = None
        for demand in self._demands:
            request = adapt_request(self._request, demand)
            calls = {kind: dialect.build_chat_call(request) for kind, dialect in DIALECTS.items()}
            try:
                return await self._send(demand, calls, timeout_s=self._timeout_s, resume=self._resume)
            except ServersFailed:  # the servers of a fallback could fail at the request as well
                raise
            except NoNodeError as error:  # also ModelMissing
                first_error = first_error or error
        assert first_error is not None, "a chat has at least one demand"
        raise first_error


def adapt_request(request: ChatRequest, demand: Demand) -> ChatRequest:
    """The request with the model and the context of the demand."""
    options = request.options
    context = None if demand.residency is None else demand.residency.context
    if context is not None and options.get("num_ctx") != context:
        options = MappingProxyType({**options, "num_ctx": context})
    return replace(request, model=demand.model or request.model, options=options)
