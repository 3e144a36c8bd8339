"""Sends one GET to an inference server, with a limit for its answer. If no usable answer comes, the error says why."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping

import httpx

from gpumesh.backends import unusable_answers
from gpumesh.errors import ProbeError
from gpumesh.probes import wrong_server
from gpumesh.text.printable import printable

BODY_LIMIT = 8 << 20  # bytes; a list of models has a few hundred bytes for each model
_MODEL_LIST_KEYS = (b'"models"', b'"data"')  # of Ollama's and OpenAI's list

SILENT_SERVER_HINT = "see on the host whether the server is stuck (`ollama ps`, its log), and restart it"
_NO_SERVER_HINT = "start the server on the host, and check `backend.port` or `backend.url`"
_CLOSED_HINT = (
    "start the server on the host, or, if something else listens on that port, change `backend.port` or `backend.url`"
)


async def get_bounded(
    client: httpx.AsyncClient, url: str, headers: Mapping[str, str], extensions: Mapping[str, str]
) -> tuple[int, bytes]:
    """Sends one GET, and returns the HTTP status and the body. ``extensions`` are httpx's. Raises ProbeError."""
    response: httpx.Response | None = None
    try:
        request = client.build_request("GET", url, headers=dict(headers), extensions=dict(extensions))
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            body = await _read_body(response)
        finally:
            await response.aclose()
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        if response is not None:  # the head had come
            message = f"it stopped in the middle of its answer: {_describe_error(error)}"
            raise unusable_answers.broken_answer_error(message) from error
        raise await _no_answer_error(url, error) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        # httpx's time-outs, and all its other errors: the caller expects ProbeError only.
        message = f"it gave no answer: {_describe_error(error)}"
        raise ProbeError(message, finding_code="backend-down", hint=SILENT_SERVER_HINT) from error
    except ValueError as error:  # httpx raises it for a Location whose host name is not valid
        raise unusable_answers.broken_answer_error(f"its answer cannot be read: {_describe_error(error)}") from error
    location = response.headers.get("Location")
    if response.is_redirect and location is not None:
        raise _redirect_error(url, response.status_code, location)
    # Go's server, nginx and Apache answer plain HTTP on a TLS port with status 400 and a text that names https.
    if response.status_code == 400 and b"https" in body[:2000].lower() and httpx.URL(url).scheme == "http":
        raise wrong_server.wrong_scheme_error(url)
    return response.status_code, body


async def _read_body(response: httpx.Response) -> bytes:
    """The body, of ``BODY_LIMIT`` bytes at most. Raises ProbeError and httpx's errors."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > BODY_LIMIT:
            message = f"it answers with more than {BODY_LIMIT >> 20} MiB"
            is_model_list = any(key in body[:200] for key in _MODEL_LIST_KEYS)
            if is_model_list:  # it is an inference server, only with too many models
                raise unusable_answers.too_many_models_error(f"{message} of models")
            raise ProbeError(message, finding_code="wrong-server", hint=wrong_server.WRONG_SERVICE_HINT)
    return bytes(body)


async def _no_answer_error(url: str, error: httpx.TransportError) -> ProbeError:
    """The error that says why no HTTP answer came. If a connection was made, asks the server again to find the
    reason."""
    tls_error = next((cause for cause in _list_causes(error) if isinstance(cause, ssl.SSLError)), None)
    if tls_error is not None:
        return await wrong_server.explain_tls_failure(url, tls_error)
    if not isinstance(error, httpx.ConnectError):
        # A connection was made. httpx reads and drops an answer that is not HTTP and has no blank line, such as the
        # banner of an SSH server. So the server is asked again, without httpx.
        wrong_server_error = await wrong_server.identify_wrong_server(url)
        if wrong_server_error is not None:
            return wrong_server_error
    if isinstance(error, httpx.RemoteProtocolError):
        is_closed = "disconnected" in str(error) or "closed connection" in str(error)  # in httpcore's messages
        if is_closed:
            message = "it closed the connection without an answer"
            return ProbeError(message, finding_code="backend-down", hint=_CLOSED_HINT)
        message = f"the port answers, but not with HTTP: {_describe_error(error)}"
        return ProbeError(message, finding_code="wrong-server", hint=wrong_server.WRONG_SERVICE_HINT)
    # If a tunnel's far end finds no server, it resets the connection, before or after the request.
    message = f"it gave no answer: {_describe_error(error)}"
    return ProbeError(message, finding_code="backend-down", hint=_NO_SERVER_HINT)


def _redirect_error(url: str, status: int, location: str) -> ProbeError:
    """The error for a server that redirects a request for ``url`` to ``location``."""
    asked_url, target = httpx.URL(url), location.strip()
    hint = "a login page or a proxy stands before it: point `backend.port` or `backend.url` at the server itself"
    if asked_url.scheme == "http" and target.lower().startswith("https://"):
        hint = f"if it only wants HTTPS, write https:// in `backend.url`; else {hint}"
    message = f"it sends us elsewhere: HTTP {status}, to {printable(target, 100)}"
    return ProbeError(message, finding_code="redirected", hint=hint)


def _describe_error(error: Exception) -> str:
    """The operating system's text for the error, if a system call caused it; else the error's own text. httpx's own
    text for a failed system call says only that all attempts failed, or is empty."""
    for cause in _list_causes(error):
        # The errors of getaddrinfo have negative numbers, which strerror does not know.
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno).lower()
    return printable(str(error), 120) or type(error).__name__


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the error itself, then the error that caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
