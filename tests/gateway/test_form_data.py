"""Forms as clients write them, and forms that two servers would read differently."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from gpumesh.gateway.body_parsers.form_data import Form, read_boundary, scan_form
from gpumesh.gateway.http.errors import BadRequest

FILE = b'form-data; name="file"; filename="a.wav"'
MODEL = b'form-data; name="model"'


def part(disposition: bytes, value: bytes = b"x", head: bytes = b"") -> bytes:
    return b"--b\r\nContent-Disposition: " + disposition + b"\r\n" + head + b"\r\n" + value + b"\r\n"


def read(body: bytes) -> Form:
    steps: Generator[None, None, Form] = scan_form(body, b"b")
    while True:
        try:
            next(steps)
        except StopIteration as end:
            form: Form = end.value
            return form


END = b"--b--\r\n"


@pytest.mark.parametrize(
    "disposition",
    [
        FILE,
        b'form-data; filename="a.wav"; name="file"',
        b"form-data; name=file; filename=a.wav; filename*=utf-8''a.wav",
        b"form-data; filename*=utf-8''a.wav; name=file",
        b'form-data; name="file"; filename="a.wav"; size=3',
        b'form-data; name="file"; filename="a\\"b.wav"',
        b'Form-Data;name="file";filename="C:\\folder\\a.wav"',
        b'form-data; name="file";',
        'form-data; name="file"; filename="ä;=.wav"'.encode(),
    ],
)
def test_the_parameters_of_a_part_may_come_in_any_order(disposition: bytes) -> None:
    form = read(part(disposition) + part(MODEL, b"m") + END)
    assert form.model == "m"
    form = read(part(MODEL, b"m") + part(disposition) + END)
    assert form.model == "m"


@pytest.mark.parametrize(
    "disposition",
    [
        b'form-data; name="file"; name="model"',
        b"form-data; name=\"file\"; name*=utf-8''model",
        b'form-data; name="mo\\del"',
        b'form-data; name="file"; filename="a\\"; name=model; x="b"',
        b'form-data; name="file"; filename="a\\"; name=model; x=\\"b"',
        b'form-data; name="file" filename="a"',
        b'form-data; name="fi"le"',
        b'attachment; name="file"',
        b"form-data",
        b'form-data; filename="a.wav"',
    ],
)
def test_a_name_that_servers_could_read_differently_is_refused(disposition: bytes) -> None:
    with pytest.raises(BadRequest, match="the name of a part"):
        read(part(disposition) + part(MODEL, b"m") + END)


@pytest.mark.parametrize(
    "head", [b"Content-Type: text/plain; charset=utf-16\r\n", b"Content-Transfer-Encoding: base64\r\n"]
)
def test_a_model_in_another_encoding_is_refused(head: bytes) -> None:
    with pytest.raises(BadRequest, match="as plain text"):
        read(part(MODEL, b"m", head) + END)
    assert read(part(MODEL, b"m", b"Content-Type: text/plain; charset=UTF-8\r\n") + END).model == "m"
    assert read(part(FILE, b"m", head) + END).model is None


def test_an_empty_line_before_the_first_part_is_skipped() -> None:
    """Programs that write forms by hand begin with one; servers skip it."""
    for form in (
        read(b"\r\n" + part(FILE) + part(MODEL, b"m") + END),
        read(b"\r\n" + part(MODEL, b"m") + part(FILE) + END),
    ):
        assert form.model == "m"
        renamed = b"".join(map(bytes, form.render_pieces("other")))
        assert renamed == part(MODEL, b"other") + part(FILE) + END
        assert read(renamed).model == "other"
    with pytest.raises(BadRequest):
        read(b"\r\n\r\n" + part(FILE) + END)


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=b", b"b"),
        ('Multipart/Form-Data; charset=UTF-8; x=y; boundary="b c"', b"b c"),
        ("multipart/form-data;boundary=b;charset=utf-8;", b"b"),
        ("application/json", None),
    ],
)
def test_the_boundary(content_type: str, boundary: bytes | None) -> None:
    assert read_boundary({"content-type": content_type}) == boundary


@pytest.mark.parametrize(
    "parameters",
    [
        "",
        "; boundary=",
        "; boundary=b; boundary=c",
        "; boundary=b; charset=utf-16",
        "; boundary=" + "b" * 71,
        '; boundary="b"c',
    ],
)
def test_a_boundary_that_servers_could_read_differently_is_refused(parameters: Any) -> None:
    with pytest.raises(BadRequest):
        read_boundary({"content-type": f"multipart/form-data{parameters}"})
