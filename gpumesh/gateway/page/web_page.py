"""The routes of the web page at /ui: the file, server-sent events, the past for its plots, the log, and changes.

The file holds no data of the mesh, and every client gets it. All else needs the key, if a key is set. The page can
change something (drain, resume or reconnect a node, cancel a request) only if a key is set. Without a key, everybody
who can reach the port could make such changes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qs

import msgspec

from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import BadRequest
from gpumesh.gateway.http.request import Request
from gpumesh.gateway.http.responses import Response, json_response
from gpumesh.gateway.http.streaming_response import StreamingResponse
from gpumesh.gateway.observe.active_requests import ActiveRequests
from gpumesh.gateway.observe.recent_figures import Figures, RecentFigures
from gpumesh.gateway.observe.recent_log import RecentLog
from gpumesh.gateway.page.page_file import read_page
from gpumesh.mesh.long_history import RESOLUTIONS, LongHistory
from gpumesh.mesh.mesh import Mesh
from gpumesh.wire import status_json, to_json

log = logging.getLogger(__name__)

UI_PATH = "/ui"
SAMPLE_S = 2.5  # between two samples of the mesh's state, for the plots
MIN_EVENT_INTERVAL_S = 0.5  # all changes within this time are sent as one event
BUSY_SHARE = 0.1  # the events of one page may take this share of a core at most: with many nodes they come less often
LIVE_INTERVAL_S = 1.0  # between two lists of requests, while there are any
KEEPALIVE_S = 15.0  # after this time without an event a comment is sent: proxies and browsers end silent connections
DEFAULT_RANGE_S = 3600.0
MAX_RANGE_S = float(max(step_s * steps for step_s, steps in RESOLUTIONS))
MAX_LOG_LINES = 500

_NODE_ACTIONS = ("drain", "resume", "reconnect")
_NODE_PATH = re.compile(r"/mesh/nodes/([^/]+)/([a-z]+)")
_CANCEL_PATH = re.compile(r"/mesh/requests/([0-9]{1,18})/cancel")
CANCEL_REASON = "the request was cancelled by whoever runs this gateway"


class UiPage:
    """The handlers of the page's routes. ``writable``: an API key is set, so the page may change something. Then
    every request that changes something has been checked for the key before it comes here. ``recent_log``: the log's
    last lines; ``None``: nobody keeps them."""

    def __init__(
        self,
        mesh: Mesh,
        active: ActiveRequests,
        figures: RecentFigures,
        *,
        writable: bool,
        recent_log: RecentLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mesh = mesh
        self._active = active
        self._figures = figures
        self._recent: Figures = figures.sample(clock())
        self.writable = writable
        self._recent_log = recent_log
        self._clock = clock
        self._history = LongHistory()
        html, self._security_policy = read_page()
        self._html = html.encode()
        self._closing = asyncio.Event()  # set when the page's streams must end
        self._headers = (("Cross-Origin-Opener-Policy", "same-origin"), ("Cache-Control", "no-cache"))

    async def keep_history(self) -> None:
        """Samples the mesh's state for the plots, until cancelled."""
        while True:
            state = self._mesh.snapshot()
            self._recent = recent = self._figures.sample(self._clock())
            gateway_figures = {"ttft_p50_ms": recent.ttft_p50_ms, "tokens_per_s": state.totals.tokens_per_s}
            self._history.add(state, gateway_figures)
            await asyncio.sleep(SAMPLE_S)

    def close(self) -> None:
        """Ends the streams of events: an open page must not delay the end of the mesh."""
        self._closing.set()

    def end_streams(self) -> None:
        """Ends the streams of events, and lets the pages ask for new ones: the gateway's keys may have changed."""
        self._closing.set()
        self._closing = asyncio.Event()

    async def html(self, _request: Request) -> Response:
        """The page itself, with its style and script."""
        content_type = "text/html; charset=utf-8"
        return Response(
            self._html, content_type=content_type, headers=self._headers, content_security_policy=self._security_policy
        )

    # -- what the page shows -------------------------------------------------------------------------------------

    async def events(self, request: Request) -> StreamingResponse:
        """Streams the server-sent events of the page, until the client leaves or the gateway stops."""
        stream = request.start_stream((("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")))
        async with aclosing(self._generate_events(request.key)) as events:
            async for event in events:
                stream.write(event)
                await stream.drain()
                if request.method == "HEAD":  # the answer is only a head, which has been sent now
                    break
        stream.finish()
        return stream

    async def _generate_events(self, viewer: ClientKey | None) -> AsyncGenerator[bytes]:
        """Yields whether the page may change something, and then the status after each change and the requests each
        second, until ``close`` is called. ``viewer``: the key of the page."""
        yield _render_event("hello", self._describe_page(viewer))
        closing = asyncio.ensure_future(self._closing.wait())
        changes = self._mesh.watch_changes()
        change: asyncio.Future[None] | None = None
        has_requests = True
        sent_at = self._clock()
        try:
            while not closing.done():
                if change is None:  # otherwise the last wait has timed out, and the same change is awaited again
                    change = asyncio.ensure_future(anext(changes))
                timeout_s = LIVE_INTERVAL_S if has_requests else KEEPALIVE_S
                await asyncio.wait((change, closing), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if closing.done():
                    return
                began_at = self._clock()
                document = self._describe_requests(viewer)
                is_changed = change.done()
                if is_changed or has_requests or document["count"]:
                    yield _render_event("live", document)
                    sent_at = began_at
                has_requests = document["count"] > 0
                pause_s = MIN_EVENT_INTERVAL_S
                if is_changed:
                    change.result()  # raises the error of a watch that failed
                    change = None
                    event = _render_event("status", status_json(self._mesh.snapshot()))
                    pause_s = max(pause_s, (self._clock() - began_at) / BUSY_SHARE)
                    yield event
                elif began_at - sent_at >= KEEPALIVE_S:
                    yield b": still here\n\n"
                    sent_at = began_at
                await asyncio.wait((closing,), timeout=pause_s)  # a pause, which ``close`` ends
        finally:
            closing.cancel()
            if change is not None:
                change.cancel()
                await asyncio.gather(change, return_exceptions=True)
            if isinstance(changes, AsyncGenerator):  # other iterators cannot be closed
                await changes.aclose()

    def _describe_page(self, viewer: ClientKey | None) -> dict[str, Any]:
        """What the holder of this key can do: with a key that is limited to a part of the mesh nothing can be
        changed."""
        is_limited = viewer is not None and viewer.is_limited
        return {
            "writable": self.writable and not is_limited,
            "key_set": self.writable,
            "key": None if viewer is None else viewer.label,
            "log": self._recent_log is not None,
        }

    def _describe_requests(self, viewer: ClientKey | None) -> dict[str, Any]:
        states, count = self._active.list_requests(viewer)
        return {"requests": to_json(states), "count": count, "recent": to_json(self._recent)}

    async def requests(self, request: Request) -> Response:
        """The requests in flight, the oldest first, and what clients have felt in the last minutes."""
        return json_response(json.dumps(self._describe_requests(request.key)).encode())

    async def history(self, request: Request) -> Response:
        """The past of the mesh for plots: ``?range=SECONDS`` (an hour by default, a day at most), ``&after=STEP``: only
        what came after this step. Raises BadRequest for other values."""
        query = _read_query(request)
        range_s = _read_number(query, "range", DEFAULT_RANGE_S, most=MAX_RANGE_S)
        after = _read_number(query, "after", -1.0, most=1e12)
        part = await request.run_sliced(self._history.part(range_s, None if after < 0 else int(after)))
        return json_response(msgspec.json.encode(part))

    async def log(self, request: Request) -> Response:
        """The last lines of the mesh's log, the newest first; ``?node=NAME``: those about one node. Raises BadRequest
        if nobody keeps the log, or if the key is limited to some nodes and so may not read about all."""
        if self._recent_log is None:
            raise BadRequest("this gateway keeps no log for its page", status=404)
        query = _read_query(request)
        node = query.get("node")
        key = request.key
        if key is not None and key.nodes is not None and node not in key.nodes:
            raise BadRequest("this key may read the log of its own nodes: ask with ?node=NAME", status=403)
        count = _read_number(query, "lines", 200.0, most=MAX_LOG_LINES)
        return json_response(json.dumps({"lines": to_json(self._recent_log.lines(node, int(count)))}).encode())

    # -- what the page changes -----------------------------------------------------------------------------------

    async def change_node(self, request: Request) -> Response:
        """Handles POST /mesh/nodes/NAME/drain, …/resume and …/reconnect. Raises BadRequest for another action, for an
        unknown node, and if the page is read-only."""
        match = _NODE_PATH.fullmatch(request.path)
        name, action = ("", "") if match is None else match.groups()  # a path of another form is refused below
        if action not in _NODE_ACTIONS:
            raise BadRequest(f"what can be done to a node is {', '.join(_NODE_ACTIONS)}", status=404)
        self._require_writable()
        if name not in [node.name for node in self._mesh.topology.nodes]:
            raise BadRequest(f"there is no node {name[:100]!r}", status=404)
        if action == "drain":
            self._mesh.drain(name)
        elif action == "resume":
            self._mesh.resume(name)
        else:
            self._mesh.tunnel(name).retry_now()
        return json_response(json.dumps({"node": name, "done": action}).encode())

    async def cancel_request(self, request: Request) -> Response:
        """Handles POST /mesh/requests/NUMBER/cancel. Raises BadRequest for another path, for a request that has ended,
        and if the page is read-only."""
        match = _CANCEL_PATH.fullmatch(request.path)
        if match is None:
            raise BadRequest("what can be done to a request is /mesh/requests/NUMBER/cancel", status=404)
        self._require_writable()
        number = int(match[1])
        if not self._active.cancel(number, CANCEL_REASON):
            raise BadRequest(f"there is no request {number} any more", status=404)
        log.info("request %d was cancelled by hand", number, extra={"event": "cancelled"})
        return json_response(json.dumps({"request": number, "done": "cancel"}).encode())

    def _require_writable(self) -> None:
        """Refuses a change of the mesh by the page if the gateway has no key: raises BadRequest."""
        if not self.writable:
            raise BadRequest(
                "read-only: set gateway.api_key_env in mesh.yaml to allow changes with its key", status=403
            )


def _render_event(name: str, document: Any) -> bytes:
    """A server-sent event with the document as JSON."""
    return f"event: {name}\ndata: {json.dumps(document, separators=(',', ':'))}\n\n".encode()


def _read_query(request: Request) -> dict[str, str]:
    """The members of the request's query; of a name that stands twice the first."""
    _, _, query = request.target.partition("?")
    return {name: values[0] for name, values in parse_qs(query, max_num_fields=20).items()}


def _read_number(query: dict[str, str], name: str, default: float, *, most: float) -> float:
    """The number of this name in the query. Raises BadRequest if it is none, or not between 0 and ``most``."""
    if name not in query:
        return default
    try:
        value = float(query[name])
    except ValueError:
        value = -1.0  # refused below
    if 0.0 <= value <= most:  # false for NaN
        return value
    raise BadRequest(f"{name} is a number up to {most:.0f}")
