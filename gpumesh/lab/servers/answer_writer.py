"""An answer on its way to a client, in the frames of its API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

from gpumesh.lab.answers import PlannedAnswer, ToolCall
from gpumesh.lab.engine import Timings
from gpumesh.lab.servers.replies import dump_json

BuildError = Callable[[str, int, str], web.Response]
"""An error by path, status and message."""


class AnswerFrames(Protocol):
    """One API's way to write an answer. ``encode_piece`` and ``encode_final`` give what goes on the wire when
    streaming."""

    content_type: str

    def encode_piece(self, content: str, thinking: str, tool: ToolCall | None) -> bytes: ...

    def encode_final(self, reason: str, timings: Timings) -> bytes: ...

    def encode_error(self, message: str) -> bytes:
        """A failure in mid-stream."""
        ...

    def build_document(self, answer: PlannedAnswer, timings: Timings) -> dict[str, Any]:
        """The answer as one JSON document."""
        ...


class AnswerWriter:
    """An answer on its way: headers go with the first token; a whole answer goes at its end."""

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

    async def tokens(self, start: int, end: int) -> None:
        if not self._stream:
            return
        answer, frames, thinking = self.answer, self._frames, len(self.answer.thinking)
        parts = [frames.encode_piece("", token, None) for token in answer.thinking[start:end]]
        if answer.tool is None:
            parts += (
                [
                    frames.encode_piece(token, "", None)
                    for token in answer.tokens[max(0, start - thinking) : end - thinking]
                ]
                if (end > thinking)
                else []
            )
        elif end == answer.total:
            parts.append(frames.encode_piece("", "", answer.tool))
        if parts:
            await self._send(b"".join(parts))

    async def end(self, timings: Timings) -> web.StreamResponse:
        if not self._stream:
            return web.json_response(self._frames.build_document(self.answer, timings), dumps=dump_json)
        await self._send(self._frames.encode_final(self.answer.done_reason, timings))
        return await self.stop()

    async def fail(self, message: str) -> web.StreamResponse:
        if self.response is None:
            return self._build_error(self.request.path, 500, message)
        await self._send(self._frames.encode_error(message))
        return await self.stop()

    async def stop(self) -> web.StreamResponse:
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
