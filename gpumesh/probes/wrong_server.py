"""What answers on a port instead of an inference server, by the first bytes that it sends, and what to do about it."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import httpx

from gpumesh.errors import ProbeError
from gpumesh.printable import printable
from gpumesh.probes.http_client import parse_unix_url

GREETING_S = 0.5
WRONG_SERVICE_HINT = "another service listens there: point `backend.port` or `backend.url` at the inference server"
_SSH = "that is a host's SSH port, which belongs under `ssh.port`: point `backend.port` at the inference server"
# The first characters, which server sends them, and what to do.
_KNOWN_GREETINGS = (
    (("SSH-",), "an SSH server", _SSH),
    (("-ERR", "-NOAUTH", "-DENIED", "-WRONGPASS", "-MISCONF"), "a Redis", WRONG_SERVICE_HINT),
    (("220 ", "220-", "554 "), "a mail or FTP server", WRONG_SERVICE_HINT),
    (("* OK",), "a mail server", WRONG_SERVICE_HINT),
    (("RFB ",), "a VNC server", WRONG_SERVICE_HINT),
)
_TLS_ALERT = b"\x15\x03"  # the answer of a TLS server to bytes that are not TLS


async def identify_wrong_server(url: str) -> ProbeError | None:
    """What is behind a URL that did not answer with HTTP; ``None`` if nothing answers, or an incomplete answer in HTTP
    came."""
    parsed = httpx.URL(url)
    greeting = await _read_greeting(parsed)
    if greeting.startswith(b"HTTP/"):
        return None if parsed.scheme == "http" else wrong_scheme_error(url)
    if parsed.scheme == "http" and (not greeting or greeting.startswith(_TLS_ALERT)) and await _accepts_tls(parsed):
        return wrong_scheme_error(url)
    text = printable(greeting, 60)
    if not text:
        return None
    server, hint = next(
        ((f"{server}, ", hint) for starts, server, hint in _KNOWN_GREETINGS if text.startswith(starts)),
        ("", WRONG_SERVICE_HINT),
    )
    return ProbeError(f"the port answers, but not with HTTP: {server}{text!r}", finding_code="wrong-server", hint=hint)


def wrong_scheme_error(url: str) -> ProbeError:
    """For a port that speaks HTTPS where this URL says http, or the other way round."""
    parsed = httpx.URL(url)
    asked, spoken, scheme = (
        ("plain HTTP", "HTTPS", "https") if parsed.scheme == "http" else ("HTTPS", "plain HTTP", "http")
    )
    host = parsed.host if parse_unix_url(parsed) is None else "127.0.0.1"
    hint = f"write `backend: {{url: {scheme}://{host}:PORT}}`, as the host knows it"
    return ProbeError(f"the port speaks {spoken}, and is asked with {asked}", finding_code="wrong-scheme", hint=hint)


async def explain_tls_failure(url: str, error: ssl.SSLError) -> ProbeError:
    """Why there is no TLS connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProbeError(
            f"its certificate is not accepted: {printable(error.verify_message, 120)}",
            finding_code="tls-refused",
            hint="use http:// where SSH encrypts the way, or give it a certificate of a known authority for this name",
        )
    other_error = None if "ALERT" in (error.reason or "") else await identify_wrong_server(url)
    if other_error is not None:
        return other_error
    return ProbeError(
        f"there is no TLS connection: {printable((error.reason or str(error)).replace('_', ' ').lower(), 80)}",
        finding_code="tls-refused",
        hint="look at what it offers: `openssl s_client -connect HOST:PORT`",
    )


async def _read_greeting(url: httpx.URL) -> bytes:
    """The server's answer to plain HTTP; empty when none comes in time."""
    try:
        async with asyncio.timeout(GREETING_S):
            reader, writer = await _connect(url, limit=1 << 12)
            try:
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                return await reader.read(200)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


async def _accepts_tls(url: httpx.URL) -> bool:
    """Whether the server makes a TLS handshake. Nothing is sent to it, so its certificate does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(GREETING_S):
            _reader, writer = await _connect(url, ssl=context)
            writer.close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # the server understood TLS, and declined
    except (OSError, TimeoutError):
        return False
    return True


async def _connect(url: httpx.URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    unix = parse_unix_url(url)
    if unix is not None:
        if "ssl" in options:
            options["server_hostname"] = "localhost"
        return await asyncio.open_unix_connection(unix[0], **options)
    return await asyncio.open_connection(url.host, url.port or (443 if url.scheme == "https" else 80), **options)
