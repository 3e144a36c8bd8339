"""What an inference server says of itself, over the first of its routes that answers rightly."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx

from gpumesh.backends import unusable_answers
from gpumesh.backends.base import HttpCall, Inventory
from gpumesh.backends.dialects import DIALECTS, host_header
from gpumesh.errors import ProbeError
from gpumesh.printable import printable
from gpumesh.probes import wrong_server
from gpumesh.state import BackendPhase, BackendState, Finding, Severity
from gpumesh.topology import BackendKind, BackendSpec, Target

log = logging.getLogger(__name__)

BODY_LIMIT = 8 << 20  # some hundred bytes a model
# Once a later candidate has answered, an earlier one that hangs is waited for this long: preference is not paralysis.
GRACE_S = 1.0
OPTIONAL_S = 1.5  # so long is waited for the answers that a kind of server can do without; then they are unknown


@dataclass(frozen=True, slots=True)
class BackendReport:
    """``url`` is the candidate in use, one of those that were given, and ``inventory`` what it said; both ``None``
    when none answered rightly. ``findings`` says why not, or what of the answer was of no use."""

    state: BackendState
    findings: tuple[Finding, ...] = ()
    url: str | None = None
    inventory: Inventory | None = None


@dataclass(frozen=True, slots=True)
class TimedInventory:
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
        return _down(spec, ProbeError("there is no way to it now", finding_code="backend-down"), node)
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
    return BackendReport(state, _left_out(inventory, node), urls[chosen], inventory)


def _left_out(inventory: Inventory, node: str) -> tuple[Finding, ...]:
    count = inventory.unusable
    if not count:
        return ()
    what = "1 entry" if count == 1 else f"{count} entries"
    message = f"{what} of its list of models {'has' if count == 1 else 'have'} no name that can be asked for"
    hint = "see what its own list says on the host, and give the models plain names"
    return (Finding("model-unusable", Severity.WARNING, node, message, hint),)


async def _first_in_order(tasks: Sequence[asyncio.Future[TimedInventory]]) -> int | None:
    """The place of the first success, as soon as no earlier one can come, or after a grace for those that hang."""
    pending: set[asyncio.Future[TimedInventory]] = set(tasks)
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


def _failure(task: asyncio.Future[TimedInventory]) -> ProbeError:
    error = task.exception()
    if isinstance(error, ProbeError):
        return error
    assert error is not None, "no candidate answered"
    if not isinstance(error, Exception):
        raise error
    # A bug of ours, in reading what nobody foresaw that a server could say. It costs this node, not the mesh, and
    # leaves its trace in the log.
    log.error("a server's answer to a probe could not be read", exc_info=error, extra={"event": "probe-failed"})
    return unusable_answers.broken_answer_error(f"what it says cannot be read ({type(error).__name__})")


def _worst(errors: Sequence[ProbeError]) -> ProbeError:
    """The most telling of the candidates' failures: who answered wrongly says more than who was silent."""
    return next((error for error in errors if error.finding_code != "backend-down"), errors[0])


def _down(spec: BackendSpec, error: ProbeError, node: str) -> BackendReport:
    state = BackendState(
        kind=spec.kind.value, state=BackendPhase.DOWN, last_error=error.message, error_code=error.finding_code
    )
    return BackendReport(state, (Finding(error.finding_code, Severity.ERROR, node, error.message, error.hint),))


async def ask_server(
    client: httpx.AsyncClient,
    kind: BackendKind,
    url: str,
    target: Target | None,
    *,
    api_key: str | None,
    timeout_s: float,
) -> TimedInventory:
    """What a server of this kind says of itself at ``url``; ``target`` is the same place as its host knows it.

    Raises ProbeError, and nothing else on the server's account.
    """
    dialect = DIALECTS[kind]
    calls = dialect.probe_calls()
    place = url if target is None else target.url
    headers, names = build_request_options(target, api_key)
    began = time.perf_counter()
    took_ms: list[float] = []

    required = dialect.required_probes

    async def one(name: str, call: HttpCall) -> tuple[int, bytes] | ProbeError | None:
        limit_s = timeout_s if name in required else min(timeout_s, OPTIONAL_S)
        try:
            async with asyncio.timeout(limit_s):
                answer = await get_bounded(client, url + call.path, headers, names)
        except ProbeError as error:
            return error if name in required else None
        except TimeoutError:
            message = f"it did not answer within {limit_s:g} s"
            return ProbeError(message, finding_code="backend-down", hint=_SILENT) if name in required else None
        took_ms.append((time.perf_counter() - began) * 1000.0)
        return answer

    results = await asyncio.gather(*(one(name, call) for name, call in calls.items()))
    try:
        answers: dict[str, tuple[int, bytes] | None] = {}
        for name, result in zip(calls, results, strict=True):
            if isinstance(result, ProbeError):
                raise result
            answers[name] = result
        return TimedInventory(dialect.read_inventory(answers), min(took_ms))
    except ProbeError as error:
        hint = _OTHER_KEY if error.finding_code == "key-refused" and api_key is not None else error.hint
        raise ProbeError(f"{place}: {error.message}", finding_code=error.finding_code, hint=hint) from error


def build_request_options(target: Target | None, api_key: str | None) -> tuple[dict[str, str], dict[str, str]]:
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
_CLOSED = (
    "start the server on the host, or, if something else listens on that port, change `backend.port` or `backend.url`"
)
_OTHER_KEY = "it does not accept the key that it was given: check the variable that `backend.api_key_env` names"
_LIST = (b'"models"', b'"data"')


async def get_bounded(
    client: httpx.AsyncClient, url: str, headers: Mapping[str, str], extensions: Mapping[str, str]
) -> tuple[int, bytes]:
    """Status and body, bounded. Raises ProbeError."""
    response: httpx.Response | None = None
    try:
        request = client.build_request("GET", url, headers=dict(headers), extensions=dict(extensions))
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            body = await _body(response)
        finally:
            await response.aclose()
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        if response is not None:
            raise unusable_answers.broken_answer_error(
                f"it stopped in the middle of its answer: {_words(error)}"
            ) from error
        raise await _no_answer(url, error) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        message = f"it gave no answer: {_words(error)}"
        raise ProbeError(message, finding_code="backend-down", hint=_SILENT) from error
    except ValueError as error:  # as httpx raises it for a Location with a host name that is none
        raise unusable_answers.broken_answer_error(f"its answer cannot be read: {_words(error)}") from error
    location = response.headers.get("Location")
    if response.is_redirect and location is not None:
        raise _redirected(url, response.status_code, location)
    if response.status_code == 400 and b"https" in body[:2000].lower() and httpx.URL(url).scheme == "http":
        raise wrong_server.wrong_scheme_error(url)  # as Go's server, nginx and Apache say it
    return response.status_code, body


async def _body(response: httpx.Response) -> bytes:
    """Raises ProbeError and what httpx raises."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > BODY_LIMIT:
            message = f"it answers with more than {BODY_LIMIT >> 20} MiB"
            if any(key in body[:200] for key in _LIST):
                raise unusable_answers.too_many_models_error(f"{message} of models")
            raise ProbeError(message, finding_code="wrong-server", hint=wrong_server.WRONG_SERVICE_HINT)
    return bytes(body)


async def _no_answer(url: str, error: httpx.TransportError) -> ProbeError:
    """Not a word of HTTP came."""
    broken_tls = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), None)
    if broken_tls is not None:
        return await wrong_server.explain_tls_failure(url, broken_tls)
    if not isinstance(error, httpx.ConnectError):
        # What is no HTTP and has no blank line (the banner of an SSH server) was read and passed over.
        found = await wrong_server.identify_wrong_server(url)
        if found is not None:
            return found
    if isinstance(error, httpx.RemoteProtocolError):
        if "disconnected" not in str(error) and "closed connection" not in str(error):
            message = f"the port answers, but not with HTTP: {_words(error)}"
            return ProbeError(message, finding_code="wrong-server", hint=wrong_server.WRONG_SERVICE_HINT)
        return ProbeError("it closed the connection without an answer", finding_code="backend-down", hint=_CLOSED)
    # At the end of a tunnel that has nobody behind it a connection is reset, sooner or later.
    message = f"it gave no answer: {_words(error)}"
    return ProbeError(message, finding_code="backend-down", hint=_NOBODY)


def _redirected(url: str, status: int, location: str) -> ProbeError:
    here, there = httpx.URL(url), location.strip()
    hint = "a login page or a proxy stands before it: point `backend.port` or `backend.url` at the server itself"
    if here.scheme == "http" and there.lower().startswith("https://"):
        hint = f"if it only wants HTTPS, write https:// in `backend.url`; else {hint}"
    message = f"it sends us elsewhere: HTTP {status}, to {printable(there, 100)}"
    return ProbeError(message, finding_code="redirected", hint=hint)


def _words(error: Exception) -> str:
    """The system's own words where it has some: httpx says no more than that all attempts failed, or nothing."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno).lower()
    return printable(str(error), 120) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
