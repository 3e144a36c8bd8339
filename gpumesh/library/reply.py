"""``Reply``: one request to a model, which can be awaited as a whole or read piece by piece."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from gpumesh.backends.base import Chunk, ServerCounters
from gpumesh.errors import BackendError, ProbeError, StreamCut
from gpumesh.library.arguments import Ask, Steering
from gpumesh.library.gateway_link import GatewayLink, translated_stream_errors
from gpumesh.library.results import Completion, ReplyChunk
from gpumesh.library.wire_forms import AnswerReader, build_call, create_reader


class Route(NamedTuple):
    """How a request goes to the gateway: its model, and whether in Ollama's own API."""

    model: str
    is_native: bool


class Reply:
    """The answer to one request. Nothing is sent before it is used, in one of these ways:

    - ``await reply`` returns the whole answer as a ``Completion``.
    - ``async for chunk in reply`` yields its pieces as they come.
    - ``async with reply`` sends the request, and ends the generation on the host if the block is left early.

    ``node`` is known from the first piece on, ``completion`` at the end.
    """

    def __init__(
        self,
        link: GatewayLink,
        ask: Ask,
        steering: Steering,
        find_route: Callable[[Ask, Steering], Awaitable[Route]],
    ) -> None:
        """``find_route`` waits until a node can serve the request. Raises GPUMeshError if none can."""
        self._link = link
        self._ask = ask
        self._steering = steering
        self._find_route = find_route
        self._response: httpx.Response | None = None  # ``None``: the request is not sent
        self._reader: AnswerReader | None = None
        self._sent_at = 0.0  # in seconds of ``time.perf_counter``
        self._ttft_ms: float | None = None
        self._model = ask.model or ""
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._counters: ServerCounters | None = None
        self._done_reason: str | None = None
        self._is_streamed = False
        self._is_closed = False
        self.completion: Completion | None = None

    def __repr__(self) -> str:
        if self.completion is not None:
            phase = "complete"
        elif self._is_closed:
            phase = "closed"
        else:
            phase = "not sent" if self._response is None else f"from {self.node}"
        return f"<Reply {self._model or 'of the default model'} {phase}>"

    @property
    def node(self) -> str | None:
        """The name of the node that answers."""
        return None if self._response is None else self._response.headers.get("X-GPUMesh-Node")

    # -- the ways to use it --------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._read_all().__await__()

    async def __aiter__(self) -> AsyncIterator[ReplyChunk]:
        """Raises GPUMeshError at the first piece if the request fails, and StreamCut if the answer breaks off."""
        if self._response is None:
            await self._send(stream=True)
        try:
            async for chunk in self._read_pieces():
                yield chunk
        finally:
            await self.aclose()

    async def __aenter__(self) -> Self:
        if self._response is None:
            await self._send(stream=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the request, even if its answer is not complete."""
        self._is_closed = True
        if self._response is not None:
            with suppress(httpx.HTTPError):  # the connection has ended already
                await self._response.aclose()

    # -- sending and reading -------------------------------------------------------------------------------------

    async def _read_all(self) -> Completion:
        """Sends the request if it is not sent yet, and returns the whole answer."""
        if self.completion is not None:
            return self.completion
        if self._response is None:
            await self._send(stream=False)
        try:
            async for _ in self._read_pieces():
                pass
        finally:
            await self.aclose()
        assert self.completion is not None, "an answer that ends without error is complete"
        return self.completion

    async def _send(self, *, stream: bool) -> None:
        """Sends the request, and returns when the head of the answer has come. Raises GPUMeshError."""
        if self._is_closed:
            raise RuntimeError("this reply was closed; ask again")
        self._sent_at = time.perf_counter()
        self._is_streamed = stream
        model, is_native = await self._find_route(self._ask, self._steering)
        call = build_call(self._ask, model=model, stream=stream, is_native=is_native)
        self._response = await self._link.send(call.path, call.body, self._steering.headers(), model=model)
        self._model = self._response.headers.get("X-GPUMesh-Model", model)
        self._reader = create_reader(stream=stream, is_native=is_native)

    async def _read_pieces(self) -> AsyncIterator[ReplyChunk]:
        """Yields the rest of the answer, and sets ``completion`` at its end."""
        response, reader = self._response, self._reader
        if self._is_closed or self.completion is not None:
            raise RuntimeError("this reply was read to its end, or closed; ask again")
        assert response is not None, "the request was not sent"
        assert reader is not None, "the request was not sent"
        calls_before = 0
        try:
            with translated_stream_errors(self.node):
                async for data in response.aiter_raw():
                    for chunk in self._add_chunks(reader.feed(data)):
                        yield chunk
                    if len(reader.tool_calls) > calls_before:
                        yield ReplyChunk(tool_calls=tuple(reader.tool_calls[calls_before:]))
                        calls_before = len(reader.tool_calls)
            for chunk in self._add_chunks(reader.close()):
                yield chunk
            if len(reader.tool_calls) > calls_before:
                yield ReplyChunk(tool_calls=tuple(reader.tool_calls[calls_before:]))
        except StreamCut as error:
            error.node = error.node or self.node
            raise
        except (BackendError, ProbeError) as error:  # an error frame of the gateway or of the server
            raise StreamCut(error.message, hint=error.hint, node=self.node) from error
        self.completion = self._make_completion(reader)

    def _add_chunks(self, chunks: Any) -> list[ReplyChunk]:
        """Keeps the text and the figures of the chunks, and returns the pieces to show."""
        pieces = []
        chunk: Chunk
        for chunk in chunks:
            if chunk.text or chunk.thinking:
                if self._ttft_ms is None and self._is_streamed:
                    self._ttft_ms = self._elapsed_ms()
                self._texts.append(chunk.text)
                self._thoughts.append(chunk.thinking)
                pieces.append(ReplyChunk(chunk.text, chunk.thinking))
            self._counters = chunk.counters or self._counters
            self._done_reason = chunk.done_reason or self._done_reason
        return pieces

    def _elapsed_ms(self) -> float:
        return round((time.perf_counter() - self._sent_at) * 1000, 1)

    def _make_completion(self, reader: AnswerReader) -> Completion:
        """Makes the whole answer, from what ``_add_chunks`` has kept and from the gateway's headers."""
        assert self._response is not None, "the answer has come"
        headers, counters = self._response.headers, self._counters or ServerCounters()
        return Completion(
            text="".join(self._texts),
            model=self._model,
            thinking="".join(self._thoughts),
            tool_calls=tuple(reader.tool_calls),
            node=self.node,
            attempts=read_count(headers.get("X-GPUMesh-Attempts")) or 1,
            queue_ms=_read_ms(headers.get("X-GPUMesh-Queue-Ms")),
            tokens=counters.tokens,
            prompt_tokens=counters.prompt_tokens,
            tokens_per_s=counters.tokens_per_s,
            load_ms=counters.load_ms,
            ttft_ms=self._ttft_ms,
            total_ms=self._elapsed_ms(),
            done_reason=self._done_reason,
        )


def read_count(text: str | None) -> int | None:
    """A number of a header; ``None`` if it is none."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else None


def _read_ms(text: str | None) -> float:
    """A duration of a header; 0 if it is none."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
