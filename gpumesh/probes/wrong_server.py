"""Who answers on a port instead of an inference server: what its first words tell, and what to do about it."""

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
# First words, who says them, and what to do.
_KNOWN = (
    (("SSH-",), "an SSH server", _SSH),
    (("-ERR", "-NOAUTH", "-DENIED", "-WRONGPASS", "-MISCONF"), "a Redis", WRONG_SERVICE_HINT),
    (("220 ", "220-", "554 "), "a mail or FTP server", WRONG_SERVICE_HINT),
    (("* OK",), "a mail server", WRONG_SERVICE_HINT),
    (("RFB ",), "a VNC server", WRONG_SERVICE_HINT),
)
_ALERT = b"\x15\x03"  # TLS's answer to what is no TLS


async def identify_wrong_server(url: str) -> ProbeError | None:
    """Who is behind a URL that did not answer with HTTP; ``None`` for nobody, and for half an answer in HTTP."""
    place = httpx.URL(url)
    said = await _greeting(place)
    if said.startswith(b"HTTP/"):
        return None if place.scheme == "http" else wrong_scheme_error(url)
    if place.scheme == "http" and (not said or said.startswith(_ALERT)) and await _speaks_tls(place):
        return wrong_scheme_error(url)
    words = printable(said, 60)
    if not words:
        return None
    who, hint = next(
        ((f"{who}, ", hint) for starts, who, hint in _KNOWN if words.startswith(starts)), ("", WRONG_SERVICE_HINT)
    )
    return ProbeError(f"the port answers, but not with HTTP: {who}{words!r}", finding_code="wrong-server", hint=hint)


def wrong_scheme_error(url: str) -> ProbeError:
    """For a port that speaks the one of HTTP and HTTPS with which this URL does not begin."""
    place = httpx.URL(url)
    asked, spoken, scheme = (
        ("plain HTTP", "HTTPS", "https") if place.scheme == "http" else ("HTTPS", "plain HTTP", "http")
    )
    host = place.host if parse_unix_url(place) is None else "127.0.0.1"
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
    found = None if "ALERT" in (error.reason or "") else await identify_wrong_server(url)
    if found is not None:
        return found
    return ProbeError(
        f"there is no TLS connection: {printable((error.reason or str(error)).replace('_', ' ').lower(), 80)}",
        finding_code="tls-refused",
        hint="look at what it offers: `openssl s_client -connect HOST:PORT`",
    )


async def _greeting(place: httpx.URL) -> bytes:
    """What it says to plain HTTP; nothing, if it says nothing in time."""
    try:
        async with asyncio.timeout(GREETING_S):
            reader, writer = await _connect(place, limit=1 << 12)
            try:
                writer.write(b"GET / HTTP/1.0\r\n\r\n")
                return await reader.read(200)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


async def _speaks_tls(place: httpx.URL) -> bool:
    """Whether it shakes hands. Nothing is told to it, so it does not matter who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(GREETING_S):
            _reader, writer = await _connect(place, ssl=context)
            writer.close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it understood, and declined
    except (OSError, TimeoutError):
        return False
    return True


async def _connect(place: httpx.URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    unix = parse_unix_url(place)
    if unix is not None:
        if "ssl" in options:
            options["server_hostname"] = "localhost"
        return await asyncio.open_unix_connection(unix[0], **options)
    return await asyncio.open_connection(place.host, place.port or (443 if place.scheme == "https" else 80), **options)
