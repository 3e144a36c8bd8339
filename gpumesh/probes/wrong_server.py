"""Identifies a server that is no inference server by the first bytes that it sends, and says what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

import httpx

from gpumesh.errors import ProbeError
from gpumesh.probes.http_client import parse_unix_url
from gpumesh.text.printable import printable

GREETING_TIMEOUT_S = 0.5  # of one connection; short, because it is a part of the probe's own time
GREETING_BYTES = 200  # of the first answer; the rest is not read
BUFFER_BYTES = 1 << 12  # of a connection: asyncio reads no more in advance
WRONG_SERVICE_HINT = "another service listens there: point `backend.port` or `backend.url` at the inference server"
_SSH_PORT_HINT = (
    "that is a host's SSH port, which belongs under `ssh.port`: point `backend.port` at the inference server"
)
# The first characters of a greeting, the server that sends them, and what to do.
_KNOWN_GREETINGS = (
    (("SSH-",), "an SSH server", _SSH_PORT_HINT),
    (("-ERR", "-NOAUTH", "-DENIED", "-WRONGPASS", "-MISCONF"), "a Redis", WRONG_SERVICE_HINT),
    (("220 ", "220-", "554 "), "a mail or FTP server", WRONG_SERVICE_HINT),
    (("* OK",), "a mail server", WRONG_SERVICE_HINT),
    (("RFB ",), "a VNC server", WRONG_SERVICE_HINT),
)
_TLS_ALERT = b"\x15\x03"  # a TLS server's answer to bytes that are not TLS


async def identify_wrong_server(url: str) -> ProbeError | None:
    """Connects again to a server whose first answer was not HTTP. Returns the error that names the kind of the server,
    or the scheme that it speaks. ``None`` if no readable answer comes, or if the server does speak HTTP."""
    parsed_url = httpx.URL(url)
    greeting = await _read_greeting(parsed_url)
    if greeting.startswith(b"HTTP/"):
        return None if parsed_url.scheme == "http" else wrong_scheme_error(url)
    # To a request in plain HTTP, a TLS server answers with an alert or not at all.
    may_speak_tls = not greeting or greeting.startswith(_TLS_ALERT)
    if parsed_url.scheme == "http" and may_speak_tls and await _accepts_tls(parsed_url):
        return wrong_scheme_error(url)
    text = printable(greeting, 60)
    if not text:
        return None
    description, hint = repr(text), WRONG_SERVICE_HINT
    for prefixes, server, known_hint in _KNOWN_GREETINGS:
        if text.startswith(prefixes):
            description, hint = f"{server}, {text!r}", known_hint
            break
    message = f"the port answers, but not with HTTP: {description}"
    return ProbeError(message, finding_code="wrong-server", hint=hint)


def wrong_scheme_error(url: str) -> ProbeError:
    """The error for a port that speaks HTTPS although ``url`` says http, or the other way round."""
    parsed_url = httpx.URL(url)
    if parsed_url.scheme == "http":
        asked_protocol, spoken_protocol, right_scheme = "plain HTTP", "HTTPS", "https"
    else:
        asked_protocol, spoken_protocol, right_scheme = "HTTPS", "plain HTTP", "http"
    host = parsed_url.host if parse_unix_url(parsed_url) is None else "127.0.0.1"
    hint = f"write `backend: {{url: {right_scheme}://{host}:PORT}}`, as the host knows it"
    return ProbeError(
        f"the port speaks {spoken_protocol}, and is asked with {asked_protocol}", finding_code="wrong-scheme", hint=hint
    )


async def explain_tls_failure(url: str, error: ssl.SSLError) -> ProbeError:
    """The error that says why no TLS connection was made. If the server perhaps speaks no TLS at all, asks it
    again to find out."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProbeError(
            f"its certificate is not accepted: {printable(error.verify_message, 120)}",
            finding_code="tls-refused",
            hint="use http:// where SSH encrypts the way, or give it a certificate of a known authority for this name",
        )
    if not _is_tls_alert(error):
        other_error = await identify_wrong_server(url)
        if other_error is not None:
            return other_error
    return ProbeError(
        f"there is no TLS connection: {printable((error.reason or str(error)).replace('_', ' ').lower(), 80)}",
        finding_code="tls-refused",
        hint="look at what it offers: `openssl s_client -connect HOST:PORT`",
    )


async def _read_greeting(url: httpx.URL) -> bytes:
    """The first bytes of the server's answer to a request in plain HTTP; empty if there is no connection, or if no
    bytes come in time."""
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            reader, writer = await _connect(url, limit=BUFFER_BYTES)
            try:
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                return await reader.read(GREETING_BYTES)
            finally:
                await _close_at_once(writer)
    except (OSError, TimeoutError):  # refused, reset, or no byte in time
        return b""


async def _accepts_tls(url: httpx.URL) -> bool:
    """Whether the server answers a TLS handshake. No data is sent after it, so the certificate is not verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            _reader, writer = await _connect(url, ssl=context)
            await _close_at_once(writer)
    except ssl.SSLError as error:  # an alert refuses this handshake, but only a TLS server sends it
        return _is_tls_alert(error)
    except (OSError, TimeoutError):  # no connection, or no answer to the handshake
        return False
    return True


def _is_tls_alert(error: ssl.SSLError) -> bool:
    """Whether the server sent an alert. Then the server does speak TLS, and refuses this handshake."""
    return "ALERT" in (error.reason or "")


async def _close_at_once(writer: asyncio.StreamWriter) -> None:
    """Closes the connection without waiting for the server. Takes the error of a connection that the server has reset:
    asyncio may report an error that nobody takes on the terminal, when the command ends."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _connect(url: httpx.URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to the server of this URL, at a TCP port or a Unix socket. ``options`` are asyncio's."""
    unix_parts = parse_unix_url(url)
    if unix_parts is not None:
        socket_path, _request_path = unix_parts
        if "ssl" in options:
            options["server_hostname"] = "localhost"  # asyncio demands a name for TLS, and a socket's path has none
        return await asyncio.open_unix_connection(socket_path, **options)
    default_port = 443 if url.scheme == "https" else 80
    return await asyncio.open_connection(url.host, url.port or default_port, **options)
