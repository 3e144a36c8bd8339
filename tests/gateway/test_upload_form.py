"""Forms with a file, read piece by piece however they are cut, and forms that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from gpumesh.gateway.body_parsers.upload_form import MAX_FIELD_BYTES, MAX_PARTS, FileStart, FormField, UploadParser
from gpumesh.gateway.http.errors import BadRequest

FILE = b'form-data; name="file"; filename="a.jsonl"'
PURPOSE = b'form-data; name="purpose"'
END = b"--b--\r\n"


def part(disposition: bytes, value: bytes = b"x", head: bytes = b"") -> bytes:
    return b"--b\r\nContent-Disposition: " + disposition + b"\r\n" + head + b"\r\n" + value + b"\r\n"


def read(body: bytes, step: int | None = None) -> tuple[list[Any], bytes]:
    """What the form has beside its file, and the file."""
    parser = UploadParser(b"b")
    others: list[Any] = []
    content = b""
    step = step or len(body) or 1
    for start in range(0, len(body), step):
        for event in parser.feed(body[start : start + step]):
            if isinstance(event, bytes):
                content += event
            else:
                others.append(event)
    parser.finish()
    return others, content


@pytest.mark.parametrize("step", [None, 1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", b"{}\n{}\n", b"\r\n--", b"\r\n--c--\r\n", b"--b", b"\r\r\n\r\n-", bytes(range(256)) * 3],
)
def test_a_file_is_read_byte_by_byte_however_the_body_is_cut(content: bytes, step: int | None) -> None:
    body = part(PURPOSE, b"batch") + part(FILE, content, b"Content-Type: application/jsonl\r\n") + END
    if content == b"--b":
        body = body.replace(b"\r\n--b\r\n--b", b"\r\n x--b\r\n--b", 1)
        content = b" x--b"
    assert read(body, step) == ([FormField("purpose", "batch"), FileStart("a.jsonl")], content)
    assert read(b"\r\n" + body, step)[1] == content  # an empty line first, as some clients send it


def test_fields_may_come_after_the_file() -> None:
    others, content = read(part(FILE, b"{}") + part(PURPOSE, b"batch") + part(b"form-data; name=x", b"") + b"--b--")
    assert others == [FileStart("a.jsonl"), FormField("purpose", "batch"), FormField("x", "")]
    assert content == b"{}"


def test_a_name_may_come_in_the_form_of_rfc_5987() -> None:
    named = part(b"form-data; name=file; filename*=utf-8''%C3%A4.jsonl") + END
    assert read(named)[0] == [FileStart("ä.jsonl")]


def test_little_of_a_long_file_is_held() -> None:
    parser = UploadParser(b"b")
    parser.feed(part(FILE, b"")[:-2])
    for _ in range(100):
        assert sum(len(event) for event in parser.feed(b"y" * 65536) if isinstance(event, bytes)) >= 65536 - 4
    assert len(repr(parser)) < 100


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "ends too early"),
        (b"hello", "does not begin"),
        (b"\r\n\r\n--b\r\n", "does not begin"),
        (part(FILE), "ends too early"),
        (part(FILE)[:-2] + b"--b--", "ends too early"),
        (part(PURPOSE, b"batch") + END, "no part `file`"),
        (part(FILE) + part(FILE) + END, "`file` twice"),
        (part(FILE) + part(PURPOSE) + part(PURPOSE) + END, "`purpose` twice"),
        (part(b'form-data; name="other"; filename="a"') + END, "only `file` is a file"),
        (part(PURPOSE, b"x", b"Content-Transfer-Encoding: base64\r\n") + END, "plain text"),
        (part(PURPOSE, b"\xff") + END, "not UTF-8"),
        (part(b'form-data; name="\xff"') + END, "not UTF-8"),
        (part(PURPOSE, b"x" * (MAX_FIELD_BYTES + 1)) + END, "too long"),
        (part(PURPOSE, b"x" * (MAX_FIELD_BYTES * 9)), "too long"),
        (b"--b\r\n" + b"a" * 9000, "no end of its head"),
        (part(b"form-data"), "cannot be read"),
        (b"--bx\r\n", "line of the boundary"),
        (part(FILE) + END + b"more", "follows after"),
        (part(FILE) + END + b"\r\n" * 3000, "follows after"),
        (b"".join(part(b"form-data; name=%d" % number) for number in range(MAX_PARTS + 1)) + END, "parts"),
    ],
)
def test_what_is_no_form_with_one_file_is_refused(body: bytes, reason: str) -> None:
    for step in (None, 1):
        with pytest.raises(BadRequest, match=reason):
            read(body, step)
