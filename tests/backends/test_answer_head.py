"""What of a host's head is kept: an allow-list, whatever the host says."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.backends.answer_head import MAX_HEADERS, AnswerHead, read_head, read_media_type

JSON = (b"Content-Type", b"application/json")


def of(*fields: tuple[bytes, bytes], status: int = 200, empty: bool = False) -> AnswerHead:
    return read_head(status, fields, empty=empty)


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        (b"application/json", "application/json"),
        (b"application/json; charset=utf-8", "application/json; charset=utf-8"),
        (b"Application/JSON ; Charset=UTF-8", "application/json; charset=utf-8"),
        (b'application/json;charset="utf-8";', "application/json; charset=utf-8"),
        (b"application/json; profile=x", "application/json"),
        (b"text/json", "application/json"),
        (b"application/problem+json", "application/problem+json"),
        (b"application/x-ndjson", "application/x-ndjson"),
        (b"application/jsonl", "application/x-ndjson"),
        (b"text/event-stream; charset=utf-8", "text/event-stream; charset=utf-8"),
        (b"text/plain", "text/plain"),
        (b"text/plain; charset=utf-7", "text/plain"),
        (b"text/vtt; charset=utf-8", "text/plain; charset=utf-8"),
        (b"application/x-subrip", "text/plain"),
        (b"audio/mpeg", "audio/mpeg"),
        (b"audio/pcm;rate=24000;channels=1", "audio/pcm; rate=24000; channels=1"),
        (b"application/octet-stream", "application/octet-stream"),
    ],
)
def test_what_an_inference_server_answers_with(given: bytes, handed_on: str) -> None:
    head = of((b"content-TYPE", given))
    assert head.problem is None
    assert head.headers == (("Content-Type", handed_on),)
    assert head.media_type == handed_on.partition(";")[0]


@pytest.mark.parametrize(
    "given",
    [
        b"text/html",
        b"TEXT/HTML; charset=utf-8",
        b"application/xhtml+xml",
        b"image/svg+xml",
        b"text/xml",
        b"application/xml",
        b"text/javascript",
        b"application/javascript",
        b"text/css",
        b"application/wasm",
        b"application/pdf",
        b"multipart/x-mixed-replace; boundary=x",
        b"application/manifest+json",
        b"image/png",
        b"video/mp4",
        b"*/*",
        b"",
        b"text",
        b"text/plain;text/html",
        b"text/plain, text/html",
        b"text/plain; charset=utf-8, text/html",
        b"text/plain\x00",
        b"text/html\x0btext/plain",
        b"audio/",
        b"audio/<script>",
        b"application/json; charset",
        b'application/json; a="b',
        b"application/json; a=\xff",
        b"application/json;" + b" " * 300,
    ],
)
def test_everything_else_is_no_answer(given: bytes) -> None:
    head = of((b"Content-Type", given))
    assert head.problem is not None
    assert "no answer of an inference server" in head.problem
    assert head.headers == ()
    assert head.media_type == ""
    assert len(head.problem) < 200


def test_two_types_are_none_unless_they_are_the_same() -> None:
    assert of(JSON, (b"Content-Type", b"text/html")).problem
    assert of((b"Content-Type", b"text/html"), JSON).problem
    assert of(JSON, (b"Content-Type", b"text/plain")).problem
    assert of(JSON, (b"content-type", b"Application/JSON")).headers == (("Content-Type", "application/json"),)


def test_a_body_without_a_type_is_bytes_and_no_body_needs_no_type() -> None:
    assert of().headers == (("Content-Type", "application/octet-stream"),)
    assert of(empty=True) == AnswerHead("", (), None)
    assert of((b"Content-Type", b"text/html"), empty=True) == AnswerHead("", (), None), "as Flask's empty 200"


@pytest.mark.parametrize("status", [0, 199, 300, 301, 302, 304, 307, 399, 600, 799, 999])
def test_a_status_that_is_no_answer(status: int) -> None:
    head = of(JSON, (b"Location", b"http://evil.example/"), status=status)
    assert head.problem == f"it answered {status}, as no inference server does"


@pytest.mark.parametrize("status", [200, 201, 204, 400, 401, 413, 429, 500, 503, 529, 599])
def test_a_status_that_is_one(status: int) -> None:
    assert of(JSON, status=status).problem is None


def test_what_clients_read_is_kept() -> None:
    kept = {
        "Retry-After": "3",
        "Retry-After-Ms": "20",
        "X-Should-Retry": "true",
        "X-Request-Id": "req_1",
        "Request-Id": "req_2",
        "OpenAI-Processing-Ms": "12",
        "OpenAI-Version": "2020-10-01",
        "OpenAI-Organization": "org",
        "x-ratelimit-remaining-tokens": "100",
        "anthropic-ratelimit-requests-reset": "2026-11-29T00:00:00Z",
    }
    head = of(JSON, *((name.encode(), value.encode()) for name, value in kept.items()))
    assert dict(head.headers) == {"Content-Type": "application/json", **kept}


@pytest.mark.parametrize(
    "name",
    [
        "Set-Cookie",
        "Set-Cookie2",
        "Service-Worker-Allowed",
        "Clear-Site-Data",
        "Access-Control-Allow-Origin",
        "Access-Control-Allow-Credentials",
        "Access-Control-Expose-Headers",
        "X-GPUMesh-Node",
        "X-GPUMesh-Attempts",
        "X-GPUMesh-Why",
        "Link",
        "Refresh",
        "Location",
        "Content-Location",
        "Content-Disposition",
        "Alt-Svc",
        "SourceMap",
        "X-SourceMap",
        "NEL",
        "Report-To",
        "Reporting-Endpoints",
        "Strict-Transport-Security",
        "Public-Key-Pins",
        "WWW-Authenticate",
        "Proxy-Authenticate",
        "Authentication-Info",
        "Content-Security-Policy",
        "Content-Security-Policy-Report-Only",
        "Speculation-Rules",
        "Supports-Loading-Mode",
        "Cross-Origin-Opener-Policy",
        "Cross-Origin-Embedder-Policy",
        "Origin-Agent-Cluster",
        "Permissions-Policy",
        "Accept-CH",
        "Critical-CH",
        "Cache-Control",
        "Expires",
        "ETag",
        "Last-Modified",
        "Age",
        "Vary",
        "Server",
        "Date",
        "Via",
        "Connection",
        "Keep-Alive",
        "Transfer-Encoding",
        "Content-Length",
        "Trailer",
        "Upgrade",
        "TE",
        "Timing-Allow-Origin",
        "Use-As-Dictionary",
        "Content-Range",
        "Accept-Ranges",
        "Attribution-Reporting-Register-Source",
        "Observe-Browsing-Topics",
        "Document-Policy",
        "X-Powered-By",
        "X-Anything",
    ],
)
def test_nothing_else_is(name: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        assert of(JSON, (spelled.encode(), b"1")).headers == (("Content-Type", "application/json"),)


@pytest.mark.parametrize(
    "field",
    [
        (b"Retry-After", b"1\r\nSet-Cookie: a=b"),
        (b"Retry-After", b"\x1b[2J"),
        (b"Retry-After", b"caf\xc3\xa9"),
        (b"Retry-After", b""),
        (b"Retry-After", b"1" * 300),
        (b"x-ratelimit-a:b", b"1"),
        (b"x-ratelimit-\xff", b"1"),
        (b"x-ratelimit-" + b"a" * 100, b"1"),
        (b"Retry-After\x00", b"1"),
    ],
)
def test_names_and_values_are_bounded_and_plain(field: tuple[bytes, bytes]) -> None:
    assert of(JSON, field).headers == (("Content-Type", "application/json"),)


def test_how_many_are_kept_is_bounded_and_of_one_name_the_first() -> None:
    many = [(b"x-ratelimit-%d" % number, b"1") for number in range(500)]
    assert len(of(JSON, *many).headers) == MAX_HEADERS + 1
    assert dict(of((b"retry-after", b"1"), (b"Retry-After", b"2")).headers)["Retry-After"] == "1"


def test_a_packed_body_that_nobody_asked_for() -> None:
    assert of(JSON, (b"Content-Encoding", b"gzip")).problem
    assert of(JSON, (b"Content-Encoding", b"\x1b]0;x\x07")).problem
    assert of(JSON, (b"Content-Encoding", b" Identity")).problem is None


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=20), st.integers(0, 999))
def test_whatever_comes_what_is_kept_can_stand_in_a_head(fields: list[tuple[bytes, bytes]], status: int) -> None:
    for name, value in of(JSON, *fields, status=status).headers:
        assert name.isascii()
        assert (name + value).isprintable()
        assert len(name) + len(value) < 400


@pytest.mark.parametrize("tail", [b" \t" * 90, b"; " * 90, b";\t " * 60, b"; a=b" * 37, b'; a="' * 37, b"-" * 180])
def test_reading_a_type_takes_no_time_whatever_it_is(tail: bytes) -> None:
    """One pattern for the whole of it took for ever."""
    began = time.monotonic()
    read_media_type(b"text/plain" + tail + b"\x00")
    assert time.monotonic() - began < 1.0
