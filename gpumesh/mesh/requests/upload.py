"""``upload`` sends a body that is too large to hold. Such a body can be read only once: one attempt, no failover.

httpx sends the body, because httpx can stream it. The HTTP client of the hot path (upstream.py) cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable

import httpx

from gpumesh.backends.answer_head import read_head
from gpumesh.backends.dialects import host_header
from gpumesh.backends.error_text import error_text, is_web_page
from gpumesh.balancer.outcomes import Outcome, classify_status
from gpumesh.errors import BackendUnreachable, DeadlineExceeded
from gpumesh.mesh.nodes.lease import Lease
from gpumesh.mesh.requests.answer import WholeAnswer, error_answer

CONNECT_TIMEOUT_S = 10.0
ANSWER_BYTES = 1 << 20  # at most so much of the answer's body is read


async def upload(
    http: httpx.AsyncClient, lease: Lease, path: str, body: AsyncIterable[bytes], *, timeout_s: float
) -> WholeAnswer:
    """Posts the body to ``path`` on the leased node, releases the lease, and returns the answer. Raises
    BackendUnreachable and DeadlineExceeded."""
    node, loop = lease.node, asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s) as scope:
            # When the tunnel fails, the scope ends at once, with the same TimeoutError as at its deadline.
            lease.set_abort_callback(lambda: scope.reschedule(loop.time()))
            # httpx limits only the connect: the deadline of the scope is the limit for everything after it.
            httpx_timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
            async with http.stream(
                "POST", node.base_url + path, content=body, headers=_request_headers(lease), timeout=httpx_timeout
            ) as response:
                received = bytearray()
                async for piece in response.aiter_raw():  # not decompressed: a few bytes could become gigabytes
                    received += piece[: ANSWER_BYTES - len(received)]
                    if len(received) == ANSWER_BYTES:
                        break  # the answer may have no end
    except TimeoutError:
        if lease.aborted:
            lease.release(Outcome.UNREACHABLE, error="the way to it was lost")
            raise BackendUnreachable("the way to it was lost", node=node.name) from None
        lease.release(Outcome.DEADLINE)
        raise DeadlineExceeded(f"not done within {timeout_s:.0f} s", node=node.name) from None
    except httpx.HTTPError as error:
        message = f"the upload broke off: {error or type(error).__name__}"
        lease.release(Outcome.UNREACHABLE, error=message)
        raise BackendUnreachable(message, node=node.name) from error
    except BaseException:  # a cancellation, or an error of ``body``: the client has gone
        lease.release(Outcome.CLIENT_GONE)
        raise
    status, answer_body = response.status_code, bytes(received)
    head = read_head(status, response.headers.raw, empty=not answer_body)
    if head.problem is not None and not 400 <= status < 600:  # a success that no inference server sent
        lease.release(Outcome.SERVER_ERROR, error=head.problem)
        return error_answer(node.name, node.kind, 502, head.headers, head.problem)
    lease.release(classify_status(status, model_asked=False))
    if head.problem is not None:
        problem = error_text(status, answer_body) if is_web_page(answer_body) else head.problem
        return error_answer(node.name, node.kind, status, head.headers, problem)
    return WholeAnswer(node.name, node.kind, status, head.headers, answer_body)


def _request_headers(lease: Lease) -> dict[str, str]:
    """The headers of the upload, with the node's own API key if it has one."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}
    if lease.node.target is not None:
        headers["Host"] = host_header(lease.node.target)
    key = lease.node.api_key()
    return headers if key is None else {**headers, "Authorization": f"Bearer {key}"}
