"""The routes of the web page at /ui: static file, server-sent events, the last hour for its plots, changes of a node.

The file holds no data of the mesh, and every client gets it. The events need the key, if a key is set. The page can
change something (drain, resume or reconnect a node) only if a key is set. Without a key, everybody who can reach the
port could make such changes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import resources
from typing import Any

from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.mesh.history import Recorder
from gpumesh.mesh.mesh import Mesh
from gpumesh.wire import status_json, to_json

HISTORY_STEP_S = 15.0  # the time that one point of a plot covers
HISTORY_STEPS = 240  # one hour in all
UI_PATH = "/ui"
SAMPLE_S = 2.5  # between two samples of the mesh's state, for the plots
MIN_EVENT_INTERVAL_S = 0.5  # all changes within this time are sent as one event
KEEPALIVE_S = 15.0  # after this time without an event a comment is sent: proxies and browsers end silent connections

_ACTIONS = ("drain", "resume", "reconnect")
_CHANGE_PATH = re.compile(r"/mesh/nodes/([^/]+)/([a-z]+)")


class UiPage:
    """The handlers of the page's routes. ``writable``: an API key is set, so the page may change something. Then
    every request that changes something has been checked for the key before it comes here."""

    def __init__(self, mesh: Mesh, *, writable: bool) -> None:
        self._mesh = mesh
        self.writable = writable
        self._recorder = Recorder(step_s=HISTORY_STEP_S, steps=HISTORY_STEPS)
        html = resources.files("gpumesh.gateway").joinpath("static/ui.html").read_text(encoding="utf-8")
        self._html = html.encode()
        self._closing = asyncio.Event()
        self._security_policy = _content_security_policy(html)
        self._headers = (("Cross-Origin-Opener-Policy", "same-origin"), ("Cache-Control", "no-cache"))

    async def keep_history(self) -> None:
        """Samples the mesh's state for the history of the last hour, until cancelled."""
        while True:
            self._recorder.add(self._mesh.snapshot())
            await asyncio.sleep(SAMPLE_S)

    def close(self) -> None:
        """Ends the streams of events: an open page must not delay the end of the mesh."""
        self._closing.set()

    async def html(self, _request: Request) -> Response:
        """The page itself, with its style and script."""
        content_type = "text/html; charset=utf-8"
        return Response(
            self._html, content_type=content_type, headers=self._headers, content_security_policy=self._security_policy
        )

    async def events(self, request: Request) -> StreamingResponse:
        """Streams the server-sent events of the page, until the client leaves or the gateway stops."""
        stream = request.start_stream((("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")))
        async with aclosing(self._generate_events()) as events:
            async for event in events:
                stream.write(event)
                await stream.drain()
                if request.method == "HEAD":  # the answer is only a head, which has been sent now
                    break
        stream.finish()
        return stream

    async def _generate_events(self) -> AsyncGenerator[bytes]:
        """Yields whether the page may change something, the history, and then the status after each change, until
        ``close`` is called."""
        yield _render_event("hello", {"writable": self.writable})
        now = self._mesh.snapshot().at
        yield _render_event("history", {"at": to_json(now), "history": to_json(self._recorder.history())})
        closing = asyncio.ensure_future(self._closing.wait())
        changes = self._mesh.watch_changes()
        change: asyncio.Future[None] | None = None
        try:
            while not closing.done():
                if change is None:  # otherwise the last wait has timed out, and the same change is awaited again
                    change = asyncio.ensure_future(anext(changes))
                await asyncio.wait((change, closing), timeout=KEEPALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if closing.done():
                    return
                if not change.done():
                    yield b": still here\n\n"
                    continue
                change.result()  # raises the error of a watch that failed
                change = None
                yield _render_event("status", status_json(self._mesh.snapshot()))
                await asyncio.wait((closing,), timeout=MIN_EVENT_INTERVAL_S)  # a pause, which ``close`` ends
        finally:
            closing.cancel()
            if change is not None:
                change.cancel()
                await asyncio.gather(change, return_exceptions=True)
            if isinstance(changes, AsyncGenerator):  # other iterators cannot be closed
                await changes.aclose()

    async def change_node(self, request: Request) -> Response:
        """Handles POST /mesh/nodes/NAME/drain, …/resume and …/reconnect. Raises BadRequest for another action, for an
        unknown node, and if the page is read-only."""
        match = _CHANGE_PATH.fullmatch(request.path)
        name, action = ("", "") if match is None else match.groups()  # a path of another form is refused below
        if action not in _ACTIONS:
            raise BadRequest(f"what can be done to a node is {', '.join(_ACTIONS)}", status=404)
        if not self.writable:
            raise BadRequest(
                "read-only: set gateway.api_key_env in mesh.yaml to allow changes with its key", status=403
            )
        if name not in [node.name for node in self._mesh.topology.nodes]:
            raise BadRequest(f"there is no node {name[:100]!r}", status=404)
        if action == "drain":
            self._mesh.drain(name)
        elif action == "resume":
            self._mesh.resume(name)
        else:
            self._mesh.tunnel(name).retry_now()
        return json_response(json.dumps({"node": name, "done": action}).encode())


def _render_event(name: str, document: Any) -> bytes:
    """A server-sent event with the document as JSON."""
    return f"event: {name}\ndata: {json.dumps(document, separators=(',', ':'))}\n\n".encode()


def _content_security_policy(html: str) -> str:
    """The Content-Security-Policy of the page: only the page's own script runs, and the page can neither load data from
    other servers nor send data to other servers."""
    script = html[html.index("<script>") + len("<script>") : html.rindex("</script>")]  # the page has only one
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
