"""Writes an answer to a client, in the frames of its API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.engine import Timings
from gpumesh.lab.servers.replies import dump_json

BuildError = Callable[[str, int, str], web.Response]
"""Builds an error response. Arguments: path, status, message."""


class AnswerFrames(Protocol):
    """The frames of one API. ``encode_piece`` and ``encode_final`` return the bytes of a streamed answer."""

    content_type: str

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes: ...

    def encode_final(self, reason: str, timings: Timings) -> bytes: ...

    def encode_error(self, message: str) -> bytes:
        """The frame for a failure in mid-stream."""
        ...

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        """The answer as one JSON document."""
        ...


class AnswerWriter:
    """Writes one answer. The headers are sent with the first token, or with the whole answer if it does not stream."""

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
        """Sends the tokens from number ``start`` up to, but without, ``end``. The tokens of thinking have the first
        numbers. A tool call is sent whole, with its last token."""
        if not self._stream:
            return
        answer, frames, thinking_count = self.answer, self._frames, len(self.answer.thinking)
        parts = [frames.encode_piece("", token, None) for token in answer.thinking[start:end]]
        if answer.tool is None:
            first, last = max(0, start - thinking_count), max(0, end - thinking_count)
            parts += [frames.encode_piece(token, "", None) for token in answer.tokens[first:last]]
        elif end == answer.total:
            parts.append(frames.encode_piece("", "", answer.tool))
        if parts:
            await self._send(b"".join(parts))

    async def finish(self, timings: Timings) -> web.StreamResponse:
        """Completes the answer."""
        if not self._stream:
            return web.json_response(self._frames.build_document(self.answer, timings), dumps=dump_json)
        await self._send(self._frames.encode_final(self.answer.done_reason, timings))
        return await self.stop()

    async def fail(self, message: str) -> web.StreamResponse:
        """Ends the answer with an error: a status before the first byte, otherwise a frame."""
        if self.response is None:
            return self._build_error(self.request.path, 500, message)
        await self._send(self._frames.encode_error(message))
        return await self.stop()

    async def stop(self) -> web.StreamResponse:
        """Ends the body here, without a final frame."""
        if self.response is None:
            return web.Response(status=200, content_type=self._frames.content_type)
        await self.response.write_eof()
        return self.response

    async def _send(self, data: bytes) -> None:
        if self.response is None:
            self.response = web.StreamResponse(headers={"Content-Type": self._frames.content_type})
            self.response.enable_chunked_encoding()
            await self.response.prepare(self.request)
        await self.response.write(data)
