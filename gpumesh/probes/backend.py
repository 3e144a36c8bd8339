"""What an inference server says of itself, over the first of its routes that answers rightly."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from gpumesh.backends.base import HttpCall, Inventory
from gpumesh.backends.dialects import DIALECTS, host_header
from gpumesh.errors import ProbeError
from gpumesh.printable import printable
from gpumesh.state import BackendPhase, BackendState, Finding, Severity
from gpumesh.topology import BackendKind, BackendSpec, Target

BODY_LIMIT = 8 << 20  # some hundred bytes a model
# Once a later candidate has answered, an earlier one that hangs is waited for this long: preference is not paralysis.
GRACE_S = 1.0
# What each kind cannot do without; the rest is waited for only so long, and then unknown.
REQUIRED = {BackendKind.OLLAMA: ("version", "tags"), BackendKind.OPENAI: ("models",)}
OPTIONAL_S = 1.5
GREETING_S = 0.5


@dataclass(frozen=True, slots=True)
class BackendReport:
    """``url`` is the candidate in use, one of those that were given, and ``inventory`` what it said; both ``None``
    when none answered rightly. ``findings`` has at most one: why not."""

    state: BackendState
    findings: tuple[Finding, ...] = ()
    url: str | None = None
    inventory: Inventory | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    inventory: Inventory
    latency_ms: float


async def probe_backend(
    client: httpx.AsyncClient,
    spec: BackendSpec,
    urls: Sequence[str],
    *,
    api_key: str | None,
    timeout_s: float,
    node: str,
) -> BackendReport:
    """Asks all candidates side by side; the first in order that answers as a server of this kind is used.

    ``urls`` are the routes to ``spec.targets``, in the same order. Never raises on a server's account. The client
    must have ``trust_env`` off: a proxy from the environment has no business between us and a tunnel.
    """
    if not urls:
        return _down(spec, ProbeError("there is no way to it now", finding="backend-down"), node)
    targets = spec.targets if len(spec.targets) == len(urls) else (None,) * len(urls)
    tasks = [
        asyncio.ensure_future(ask_server(client, spec.kind, url, target, api_key=api_key, timeout_s=timeout_s))
        for url, target in zip(urls, targets, strict=True)
    ]
    try:
        chosen = await _first_in_order(tasks)
        if chosen is None:
            return _down(spec, _worst([_failure(task) for task in tasks]), node)
        answered = tasks[chosen].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    inventory = answered.inventory
    state = BackendState(
        kind=spec.kind.value,
        state=BackendPhase.UP,
        url=urls[chosen],
        version=inventory.version,
        models=tuple(model.name for model in inventory.catalog),
        loaded=inventory.loaded,
        latency_ms=round(answered.latency_ms, 3),
        catalog=inventory.catalog,
    )
    return BackendReport(state, (), urls[chosen], inventory)


async def _first_in_order(tasks: Sequence[asyncio.Future[Answered]]) -> int | None:
    """The place of the first success, as soon as no earlier one can come, or after a grace for those that hang."""
    pending: set[asyncio.Future[Answered]] = set(tasks)
    timeout: float | None = None
    while True:
        best = next((place for place, task in enumerate(tasks) if task.done() and task.exception() is None), None)
        if best is not None and all(task.done() for task in tasks[:best]):
            return best
        if not pending:
            return best
        if best is not None and timeout is None:
            timeout = GRACE_S
        before = time.monotonic()
        done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - before), 0.0)
            if not done:
                return best


def _failure(task: asyncio.Future[Answered]) -> ProbeError:
    error = task.exception()
    if isinstance(error, ProbeError):
        return error
    assert error is not None, "no candidate answered"
    raise error  # ours: a bug is not hidden as a server's failure


def _worst(errors: Sequence[ProbeError]) -> ProbeError:
    """The most telling of the candidates' failures: who answered wrongly says more than who was silent."""
    return next((error for error in errors if error.finding != "backend-down"), errors[0])


def _down(spec: BackendSpec, error: ProbeError, node: str) -> BackendReport:
    state = BackendState(
        kind=spec.kind.value, state=BackendPhase.DOWN, last_error=error.message, error_code=error.finding
    )
    return BackendReport(state, (Finding(error.finding, Severity.ERROR, node, error.message, error.hint),))


async def ask_server(
    client: httpx.AsyncClient,
    kind: BackendKind,
    url: str,
    target: Target | None,
    *,
    api_key: str | None,
    timeout_s: float,
) -> Answered:
    """What a server of this kind says of itself at ``url``; ``target`` is the same place as its host knows it.

    Raises ProbeError, and nothing else on the server's account.
    """
    dialect = DIALECTS[kind]
    calls = dialect.probe_calls()
    place = url if target is None else target.url
    headers, names = addressed(target, api_key)
    began = time.perf_counter()
    took_ms: list[float] = []

    required = REQUIRED[kind]

    async def one(name: str, call: HttpCall) -> tuple[int, bytes] | ProbeError | None:
        limit_s = timeout_s if name in required else min(timeout_s, OPTIONAL_S)
        try:
            async with asyncio.timeout(limit_s):
                answer = await _get(client, url + call.path, headers, names)
        except ProbeError as error:
            return error if name in required else None
        except TimeoutError:
            message = f"it did not answer within {limit_s:g} s"
            return ProbeError(message, finding="backend-down", hint=_SILENT) if name in required else None
        took_ms.append((time.perf_counter() - began) * 1000.0)
        return answer

    results = await asyncio.gather(*(one(name, call) for name, call in calls.items()))
    try:
        answers: dict[str, tuple[int, bytes] | None] = {}
        for name, result in zip(calls, results, strict=True):
            if isinstance(result, ProbeError):
                raise result
            answers[name] = result
        return Answered(dialect.inventory(answers), min(took_ms))
    except ProbeError as error:
        raise ProbeError(f"{place}: {error.message}", finding=error.finding, hint=error.hint) from error


def addressed(target: Target | None, api_key: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The headers and httpx's extensions of a request to a server that is called ``target`` where it runs."""
    headers = {"Accept-Encoding": "identity"}
    if target is not None:
        headers["Host"] = host_header(target)
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    # Through a tunnel the certificate names the host's own name, not our end of the tunnel.
    return headers, {"sni_hostname": target.host} if target is not None and target.scheme == "https" else {}


_SILENT = "see on the host whether the server is stuck (`ollama ps`, its log), and restart it"
_NOBODY = "start the server on the host, and check `backend.port` or `backend.url`"


async def _get(
    client: httpx.AsyncClient, url: str, headers: Mapping[str, str], extensions: Mapping[str, str]
) -> tuple[int, bytes]:
    """Status and body, bounded. Raises ProbeError."""
    try:
        request = client.build_request("GET", url, headers=dict(headers), extensions=dict(extensions))
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > BODY_LIMIT:
                    message = f"it answers with more than {BODY_LIMIT >> 20} MiB"
                    raise ProbeError(message, finding="wrong-server", hint=_NOBODY)
            return response.status_code, bytes(body)
        finally:
            await response.aclose()
    except (httpx.ConnectError, httpx.ReadError) as error:
        # At the end of a tunnel that has nobody behind it a connection is reset, sooner or later.
        message = f"it gave no answer: {_words(error)}"
        raise ProbeError(message, finding="backend-down", hint=_NOBODY) from error
    except httpx.RemoteProtocolError as error:
        said = _words(error)
        if "disconnected" in str(error) or "closed connection" in str(error):
            # What is no HTTP and has no blank line (the banner of an SSH server) was read and passed over.
            said = await _greeting(url)
            if not said:
                message = "it closed the connection without an answer"
                raise ProbeError(message, finding="backend-down", hint=_NOBODY) from error
        message = f"the port answers, but not with HTTP: {said}"
        raise ProbeError(message, finding="wrong-server", hint=_NOBODY) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        message = f"it gave no answer: {_words(error)}"
        raise ProbeError(message, finding="backend-down", hint=_SILENT) from error


async def _greeting(url: str) -> str:
    """What a server that speaks no HTTP says to it, quoted; empty for nothing, and for a half answer in HTTP."""
    place = httpx.URL(url)
    if place.scheme != "http":
        return ""
    try:
        async with asyncio.timeout(GREETING_S):
            reader, writer = await asyncio.open_connection(place.host, place.port or 80, limit=1 << 12)
            try:
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                said = await reader.read(200)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return ""
    return "" if said.startswith(b"HTTP/") or not printable(said) else repr(printable(said, 60))


def _words(error: Exception) -> str:
    """The system's own words where it has some: httpx says no more than that all attempts failed, or nothing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    return printable(str(error), 120) or type(error).__name__
