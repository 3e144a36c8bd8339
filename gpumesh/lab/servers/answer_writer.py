"""Writes an answer of a simulated server to a client, streamed or as one document, in the frames of its API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.inference.engine import Timings
from gpumesh.lab.servers.replies import dump_json

BuildError = Callable[[str, int, str], web.Response]
"""Builds an error response from the request's path, the status and the message."""


class AnswerFrames(Protocol):
    """The form of one answer in one API. Only the methods ``encode_…`` are for a streamed answer."""

    content_type: str
    """The Content-Type of a streamed answer."""

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes:
        """The frame, or frames, for the next piece: a token of text, a token of thinking, or the whole tool call."""
        ...

    def encode_final(self, reason: str, timings: Timings) -> bytes:
        """The frames that complete the answer. ``reason``: ``stop``, or ``length`` if a limit has cut the answer."""
        ...

    def encode_error(self, message: str) -> bytes:
        """The frames for a failure in mid-stream."""
        ...

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        """The whole answer as one JSON document, for a request that does not stream."""
        ...


class AnswerWriter:
    """Writes one answer to the client of ``request``.

    The headers are sent with the first token, or, if the answer does not stream, with the whole answer.
    """

    def __init__(
        self,
        request: web.Request,
        frames: AnswerFrames,
        answer: PlannedAnswer,
        *,
        stream: bool,
        build_error: BuildError,
    ) -> None:
        self.request = request
        self.answer = answer
        self.response: web.StreamResponse | None = None
        self._frames = frames
        self._stream = stream
        self._build_error = build_error

    async def send_tokens(self, start: int, end: int) -> None:
        """Sends the tokens from number ``start`` up to, but without, ``end``, if the answer streams.

        The numbers count the tokens of thinking first, then the others. A tool call is sent whole, with its last token.
        """
        if not self._stream:
            return
        answer, encode = self.answer, self._frames.encode_piece
        pieces = [encode("", token, None) for token in answer.thinking[start:end]]
        if answer.tool is None:
            thinking_count = len(answer.thinking)
            text_start, text_end = max(0, start - thinking_count), max(0, end - thinking_count)
            pieces += [encode(token, "", None) for token in answer.tokens[text_start:text_end]]
        elif end == answer.total:
            pieces.append(encode("", "", answer.tool))
        if pieces:
            await self._send(b"".join(pieces))

    async def finish(self, timings: Timings) -> web.StreamResponse:
        """Completes the answer: sends its final frames, or returns the whole answer if it does not stream."""
        if not self._stream:
            return web.json_response(self._frames.build_document(self.answer, timings), dumps=dump_json)
        await self._send(self._frames.encode_final(self.answer.done_reason, timings))
        return await self.stop()

    async def fail(self, message: str) -> web.StreamResponse:
        """Ends the answer with an error: before the first byte with the status 500, after it with a frame."""
        if self.response is None:
            return self._build_error(self.request.path, 500, message)
        await self._send(self._frames.encode_error(message))
        return await self.stop()

    async def stop(self) -> web.StreamResponse:
        """Ends the body as of a complete answer. Adds no final frame: ``finish`` and ``fail`` have sent their last
        frame; without it, this is a fault. If no byte was sent before, the body is empty."""
        if self.response is None:
            return web.Response(status=200, content_type=self._frames.content_type)
        await self.response.write_eof()
        return self.response

    async def _send(self, data: bytes) -> None:
        """Sends the bytes, and the headers before the first bytes."""
        if self.response is None:
            self.response = web.StreamResponse(headers={"Content-Type": self._frames.content_type})
            self.response.enable_chunked_encoding()
            await self.response.prepare(self.request)
        await self.response.write(data)
