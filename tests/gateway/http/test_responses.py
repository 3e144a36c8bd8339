from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpumesh import gateway
from gpumesh.gateway.http.responses import Headers, Response, has_no_body, render_head

FOR_BROWSERS = [
    "Content-Security-Policy: sandbox; default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options: nosniff",
    "X-Frame-Options: DENY",
    "Cross-Origin-Resource-Policy: same-origin",
    "Referrer-Policy: no-referrer",
]


def said(answer: bytes) -> list[str]:
    """The lines of a head, without the date's and those that are the same in each."""
    text = answer.decode()
    assert text.endswith("\r\n\r\n")
    first, *lines = text[:-4].split("\r\n")
    assert any(re.fullmatch(r"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", line) for line in lines)
    assert [line for line in lines if line in FOR_BROWSERS] == FOR_BROWSERS, "in every head"
    return [first, *(line for line in lines if not line.startswith("Date: ") and line not in FOR_BROWSERS)]


def test_headers_are_found_by_lower_case_names_and_the_first_value_counts() -> None:
    headers = Headers((("Host", "a"), ("HOST", "b"), ("X-One", "1")))
    assert (headers.get("host"), headers["x-one"], headers.get("none"), headers.get("none", "x")) == (
        "a",
        "1",
        None,
        "x",
    )
    assert (set(headers), len(headers)) == ({"host", "x-one"}, 2)
    assert headers.pairs[1] == ("HOST", "b")


def test_a_whole_answers_head() -> None:
    headers = (("Content-Type", "a/b"), ("Server", "uvicorn"), ("date", "yesterday"), ("Content-Length", "9"))
    assert said(render_head(200, headers, length=5, keep_alive=True, is_http10=False)) == [
        "HTTP/1.1 200 OK", "Server: gpumesh", "Content-Type: a/b", "Content-Length: 5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("length", "keep", "old", "lines"),
    [
        (None, True, False, ["Transfer-Encoding: chunked"]),
        (None, False, False, ["Transfer-Encoding: chunked", "Connection: close"]),
        (None, False, True, ["Connection: close"]),
        (0, True, True, ["Content-Length: 0", "Connection: keep-alive"]),
        (0, False, False, ["Content-Length: 0", "Connection: close"]),
    ],
)
def test_the_head_says_how_the_body_and_the_connection_end(
    length: int | None, keep: bool, old: bool, lines: list[str]
) -> None:
    assert said(render_head(200, (), length=length, keep_alive=keep, is_http10=old))[2:] == lines


def test_has_no_body() -> None:
    assert said(render_head(204, (), length=0, keep_alive=True, is_http10=False)) == [
        "HTTP/1.1 204 No Content",
        "Server: gpumesh",
    ]
    assert said(render_head(204, (), length=None, keep_alive=True, is_http10=False)) == [
        "HTTP/1.1 204 No Content",
        "Server: gpumesh",
    ]
    assert has_no_body("HEAD", 200)
    assert has_no_body("GET", 304)
    assert not has_no_body("GET", 200)
    assert said(render_head(799, (), length=0, keep_alive=True, is_http10=False))[0] == "HTTP/1.1 799 Unknown"


def test_a_response_may_have_a_policy_of_its_own() -> None:
    text = render_head(
        200, (), length=0, keep_alive=True, is_http10=False, content_security_policy="script-src 'sha256-x'"
    ).decode()
    assert text.count("Content-Security-Policy: ") == 1
    assert "\r\nContent-Security-Policy: script-src 'sha256-x'\r\n" in text


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\n", "\rb"])
def test_a_header_value_with_a_line_end_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match="line end"):
        render_head(200, (("X-Any", value),), length=0, keep_alive=True, is_http10=False)


def test_a_response_with_a_content_type() -> None:
    reply = Response(b"x", content_type="a/b", headers=(("X-One", "1"),))
    assert (reply.status, reply.headers, reply.close) == (200, (("Content-Type", "a/b"), ("X-One", "1")), False)


def test_the_gateway_asks_for_headers_by_their_names_in_lower_case() -> None:
    """``Headers`` holds no other names: a look-up by another spelling would never find anything."""
    for path in (Path(gateway.__file__).parent).rglob("*.py"):
        assert not re.search(r'headers(\.get\(|\[)"[^"]*[A-Z]', path.read_text()), path
