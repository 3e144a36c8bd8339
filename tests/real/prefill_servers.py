"""Servers in front of a real llama-server that differ in what they do with a last message of the assistant.

``CuttingProxy`` is that llama-server itself, whose streams can be cut. ``TemplatedOllama`` is what Ollama 0.33 is for a
model whose template llama-server renders: it sends chats on as they are, and llama-server repeats a last message of the
assistant before it continues it. Only the names and the forms of the frames are translated.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from aiohttp import web

NAME = "m"


@dataclass
class Cut:
    """The next cut, by whichever server gets the request. ``after``: pieces of text; ``None`` once it was made."""

    after: int | None = None


class CuttingProxy:
    """Passes everything on, but ends one stream as ``cut`` says. ``paths`` are those of the requests that generated
    text. A context manager."""

    def __init__(self, llama_url: str, cut: Cut) -> None:
        self.llama_url = llama_url
        self.cut = cut
        self.paths: list[str] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        # llama-server ends connections that are kept.
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        application = web.Application()
        self.add_routes(application)
        self._runner = web.AppRunner(application, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._http.close()
        await self._runner.cleanup()

    def add_routes(self, application: web.Application) -> None:
        application.router.add_get("/{path:.*}", self._get)
        application.router.add_post("/{path:.*}", self._post)

    async def _get(self, request: web.Request) -> web.Response:
        async with self._http.get(self.llama_url + request.path_qs) as reply:
            return web.Response(status=reply.status, body=await reply.read(), content_type=reply.content_type)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("stream") is not True:
            async with self._http.post(self.llama_url + request.path, json=body) as reply:
                return web.Response(status=reply.status, body=await reply.read(), content_type=reply.content_type)

        async def frames() -> AsyncIterator[tuple[bytes, bool]]:
            async for data in self._events(request.path, body):
                has_text = data != b"[DONE]" and bool(_text_of(json.loads(data)))
                yield b"data: " + data + b"\n\n", has_text

        return await self._stream(request, "text/event-stream", frames())

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The data of each event of llama-server's answer."""
        self.paths.append(path)
        async with self._http.post(self.llama_url + path, json=body) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: "):
                    yield line.strip().removeprefix(b"data: ")

    async def _stream(
        self, request: web.Request, content_type: str, frames: AsyncIterator[tuple[bytes, bool]]
    ) -> web.StreamResponse:
        """Sends each frame; the flag says whether it holds text."""
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        pieces = 0
        async for frame, has_text in frames:
            await response.write(frame)
            pieces += has_text
            if pieces == self.cut.after:
                self.cut.after = None
                assert request.transport is not None
                request.transport.close()  # closes after what was written, without the end of the body
                return response
        await response.write_eof()
        return response


class TemplatedOllama(CuttingProxy):
    """``renders``: whether the server is new enough to show a rendered prompt."""

    def __init__(self, llama_url: str, cut: Cut, *, renders: bool) -> None:
        super().__init__(llama_url, cut)
        self._renders = renders

    def add_routes(self, application: web.Application) -> None:
        models = {"models": [{"name": f"{NAME}:latest", "model": f"{NAME}:latest"}]}
        for path, document in (("/api/version", {"version": "0.33.0"}), ("/api/tags", models), ("/api/ps", models)):
            application.router.add_get(path, self._answer(document))
        application.router.add_post("/api/chat", self._chat)
        application.router.add_post("/api/generate", self._generate)
        application.router.add_post("/v1/chat/completions", self._post)

    @staticmethod
    def _answer(document: Any) -> Any:
        async def answer(_request: web.Request) -> web.Response:
            return web.json_response(document)

        return answer

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("_debug_render_only") and self._renders:
            chat = {"messages": body["messages"]}
            async with self._http.post(f"{self.llama_url}/apply-template", json=chat) as reply:
                prompt = (await reply.json())["prompt"]
            return web.json_response({"model": NAME, "_debug_info": {"rendered_template": prompt}})
        return await self._native(request, body, body["messages"], key="message")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        messages = None if body.get("raw") else [{"role": "user", "content": body["prompt"]}]
        return await self._native(request, body, messages, key="response")

    async def _native(
        self, request: web.Request, body: dict[str, Any], messages: list[Any] | None, *, key: str
    ) -> web.StreamResponse:
        """Answers in Ollama's form. ``messages`` is ``None`` for a raw prompt."""
        options = body.get("options") or {}
        sampling = {"model": NAME, "stream": True, "temperature": options.get("temperature", 0)}
        limit = options.get("num_predict", -1)

        async def lines() -> AsyncIterator[tuple[bytes, bool]]:
            if messages is None:
                events = self._events("/completion", {**sampling, "prompt": body["prompt"], "n_predict": limit})
            else:
                chat = {**sampling, "messages": messages, "max_tokens": limit}
                events = self._events("/v1/chat/completions", chat)
            count = 0
            async for data in events:
                text = _text_of(json.loads(data)) if data != b"[DONE]" else ""
                count += bool(text)
                said = {"role": "assistant", "content": text} if key == "message" else text
                if text:
                    yield json.dumps({"model": NAME, key: said, "done": False}).encode() + b"\n", True
            end = {"role": "assistant", "content": ""} if key == "message" else ""
            figures = {"done_reason": "length", "eval_count": count, "eval_duration": count * 1000}
            yield json.dumps({"model": NAME, key: end, "done": True, **figures}).encode() + b"\n", False

        if body.get("stream") is False:  # an old server that does not know how to show its prompt
            said = "".join([json.loads(line)[key]["content"] async for line, has_text in lines() if has_text])
            return web.json_response({"model": NAME, key: {"role": "assistant", "content": said}, "done": True})
        return await self._stream(request, "application/x-ndjson", lines())


def _text_of(event: dict[str, Any]) -> str:
    """The text of an event of ``/v1/chat/completions`` or of ``/completion``."""
    choices = event.get("choices")
    if choices is None:
        return str(event.get("content") or "")
    return str(choices[0]["delta"].get("content") or "") if choices else ""
