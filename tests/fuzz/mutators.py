"""New inputs out of good ones. Each mutator knows a way in which parsers break: a field that never ends, a length that
lies, a frame cut in two, text that is no text. Pure; all chance is the ``Random`` that is given, so that a seed gives
the same inputs again.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from random import Random

from tests.fuzz.cases import Case, Part

Parts = tuple[Part, ...]
Mutator = Callable[[bytes, Random], Parts]

# What parsers stumble over, in any place.
JUNK = (
    *(b"", b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\t", b" ", b":", b",", b";", b'"', b"\\", b"\x1b[2J"),
    *(
        b"\xff\xfe",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
        b"\x85",
        b"\x0b\x0c",
    ),
    *("\u00b2".encode(), "\u0663".encode(), "\u2460".encode(), "\U0001d7d8".encode(), b"\\ud800", b"\\u0000"),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"0x10", b"1_0", b"+1", b"9" * 40, b"-1", b"true", b"[]", b"{}"),
    *(
        b"{" * 50,
        b"[" * 50,
        b"%s%n",
        b"$(id)",
        b"`id`",
        b"../../",
        b"\x7f",
        b"data:",
        b"error:",
        b"HTTP/1.1 200 OK\r\n",
    ),
)
# JSON values of every kind, and those that only look like the kind that is expected.
ABSURD = (
    *(b"null", b"true", b"0", b"-1", b"1e308", b"1e999", b"NaN", b"-Infinity", b'""', b"[]", b"{}", b'"\\ud800"'),
    *(b'"0.\xc2\xb2"', b'"\xd9\xa3"', b'"\\u0000"', b'"\\u001b[2J"', b'"v"', b'"1.2.3.4.5"', b'"' + b"9" * 5000 + b'"'),
    *(
        b"9" * 400,
        b"[[[[]]]]",
        b"[null]",
        b"[1]",
        b'{"a":{"b":{}}}',
        b'["\\ud800"]',
        b'{"":null}',
        b'"0001-01-01T00:00:00Z"',
    ),
    *(b'"2026-13-45T99:99:99Z"', b'"9999-12-31T23:59:59-23:59"', b'"<script>"', b'"a\\nb"', b'"' + b"a" * 3000 + b'"'),
)
_JSON_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"(?!\s*:)|-?\d+(?:\.\d+)?|true|false|null|\[\]|\{\}')
_HEADER = re.compile(rb"^([!-9;-~]+):[ \t]*([^\r\n]*)\r\n", re.MULTILINE)
_LONG = (1, 7, 300, 5000, 70_000, 1_000_000)
_LENGTHS = (
    b"0",
    b"1",
    b"-1",
    b"+5",
    b"5,5",
    b"5, 6",
    b" 5",
    b"5 5",
    b"0x5",
    b"1e3",
    b"\xc2\xb2",
    b"9" * 30,
    b"4294967296",
)


def single_part(data: bytes) -> Parts:
    return (Part(data),)


def splice(data: bytes, rng: Random) -> Parts:
    """Junk in the place of a few bytes."""
    at = rng.randrange(len(data) + 1)
    return single_part(data[:at] + rng.choice(JUNK) + data[at + rng.choice((0, 0, 1, 2, 8)) :])


def flip(data: bytes, rng: Random) -> Parts:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5)) if found else 0):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return single_part(bytes(found))


def cut(data: bytes, rng: Random) -> Parts:
    return single_part(data[: rng.randrange(len(data) + 1)])


def repeat_byte(data: bytes, rng: Random) -> Parts:
    """One byte, up to a million times, in its place."""
    if not data:
        return single_part(data)
    at = rng.randrange(len(data))
    return Part(data[:at]), Part(data[at : at + 1], rng.choice(_LONG)), Part(data[at + 1 :])


def repeat_line(data: bytes, rng: Random) -> Parts:
    lines = data.splitlines(keepends=True)
    if not lines:
        return single_part(data)
    at = rng.randrange(len(lines))
    times = min(rng.choice(_LONG), (8 << 20) // len(lines[at]))
    return Part(b"".join(lines[:at])), Part(lines[at], max(times, 2)), Part(b"".join(lines[at + 1 :]))


def repeat_piece(data: bytes, rng: Random) -> Parts:
    """A few bytes again and again: what a bracket, a comma or a half line costs when there are very many."""
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.choice((1, 2, 3, 6))] or b"["
    return Part(data[:at]), Part(piece, rng.choice(_LONG)), Part(data[at:])


def exchange_lines(data: bytes, rng: Random) -> Parts:
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return single_part(b"".join(lines))


def one_byte_writes(data: bytes, rng: Random) -> Parts:
    """Each byte in a write of its own, of a part of it."""
    start = rng.randrange(len(data) + 1)
    end = min(start + rng.choice((3, 30, 300)), len(data))
    small = [Part(data[at : at + 1], apart=True) for at in range(start, end)]
    return Part(data[:start]), *small, Part(data[end:])


def json_value(data: bytes, rng: Random) -> Parts:
    """Another value where one stands in a document."""
    found = list(_JSON_VALUE.finditer(data))
    if not found:
        return splice(data, rng)
    place = rng.choice(found)
    return single_part(data[: place.start()] + rng.choice(ABSURD) + data[place.end() :])


def nest_deeply(data: bytes, rng: Random) -> Parts:
    """A value nested as deeply as anybody would try."""
    found = list(_JSON_VALUE.finditer(data))
    at, end = (place.start(), place.end()) if found and (place := rng.choice(found)) else (len(data), len(data))
    opens, closes = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"[[],", b"]")))
    times = rng.choice((100, 2_000, 100_000))
    return Part(data[:at]), Part(opens, times), Part(b"0"), Part(closes, rng.choice((0, times))), Part(data[end:])


def widen(data: bytes, rng: Random) -> Parts:
    """Very many of the smallest values."""
    found = list(_JSON_VALUE.finditer(data))
    at, end = (place.start(), place.end()) if found and (place := rng.choice(found)) else (0, len(data))
    value = rng.choice((b"[],", b"{},", b"0,", b'"",', b'{"name":"a"},', b'{"name":"\\ud800"},'))
    return Part(data[:at] + b"["), Part(value, rng.choice((100, 20_000, 300_000))), Part(b"0]" + data[end:])


GENERAL: tuple[Mutator, ...] = (
    *(splice, splice, flip, cut, repeat_byte, repeat_line, repeat_piece, exchange_lines, one_byte_writes),
    *(json_value, json_value, json_value, nest_deeply, widen),
)


# -- HTTP ------------------------------------------------------------------------------------------------------------


def header_without_end(data: bytes, rng: Random) -> Parts:
    """A value, a name or a line of the head that goes on and on."""
    head, _, _ = data.partition(b"\r\n\r\n")
    start = rng.choice((b"\r\nX: ", b"\r\n", b"\r\nX:", b"\r\nContent-Length: ", b"\r\nTransfer-Encoding: ", b""))
    size, all_of_it = rng.choice(((1, 2 << 20), (1400, 4 << 20), (16 << 10, 64 << 20)))
    filler = rng.choice((b"a", b"1", b" ", b"\t", b"a,", b"\xff"))
    return Part(head + start), Part(filler * size, all_of_it // (size * len(filler)), apart=size > 1)


def many_headers(data: bytes, rng: Random) -> Parts:
    head, end, body = data.partition(b"\r\n\r\n")
    return (
        Part(head + b"\r\n"),
        Part(rng.choice((b"a: b\r\n", b"a:\r\n", b":\r\n")), rng.choice(_LONG)),
        Part(end + body),
    )


def lengths(data: bytes, rng: Random) -> Parts:
    """Content-Length doubled, absurd, or beside Transfer-Encoding."""
    head, end, body = data.partition(b"\r\n\r\n")
    lines = [b"Content-Length: " + rng.choice(_LENGTHS) for _ in range(rng.choice((1, 2)))]
    if rng.random() < 0.4:
        coding = rng.choice((b"chunked", b"chunked, chunked", b"identity", b"gzip, chunked", b"xchunked", b"chunked\0"))
        lines.append(b"Transfer-Encoding: " + coding)
    if rng.random() < 0.5:
        head = re.sub(rb"\r\nContent-Length:[^\r]*", b"", head, flags=re.IGNORECASE)
    rng.shuffle(lines)
    return single_part(b"\r\n".join((head, *lines)) + end + body)


def chunks(data: bytes, rng: Random) -> Parts:
    """The body in chunks of sizes that nobody would send, with extensions and trailers."""
    head, _, body = data.partition(b"\r\n\r\n")
    head = re.sub(rb"\r\nContent-Length:[^\r]*", b"", head, flags=re.IGNORECASE)
    if not re.search(rb"transfer-encoding", head, re.IGNORECASE):
        head += b"\r\nTransfer-Encoding: chunked"
    kind = rng.randrange(6)
    begin = Part(head + b"\r\n\r\n")
    whole = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    if kind == 0:  # one byte each
        pieces = tuple(Part(b"1\r\n" + body[at : at + 1] + b"\r\n") for at in range(min(len(body), 400)))
        return begin, *pieces, Part(b"1\r\n \r\n", rng.choice((1, 1000, 300_000))), Part(b"0\r\n\r\n")
    if kind == 1:  # an extension without an end
        return begin, Part(b"5;"), Part(rng.choice((b"a", b"a=b;")), 1_000_000)
    if kind == 2:  # a trailer without an end
        return begin, Part(whole + b"X: "), Part(b"a", 2_000_000)
    if kind == 3:  # many trailers
        return begin, Part(whole), Part(b"a: b\r\n", rng.choice((10, 1000, 200_000))), Part(b"\r\n")
    if kind == 4:  # a size that is none
        sizes = (
            b"-1",
            b"0x5",
            b"fffffffffffffffff",
            b"8000000000000000",
            b" 5",
            b"5 ",
            b"",
            b"g",
            b"00000000000000005",
        )
        return begin, Part(rng.choice(sizes) + b"\r\nhello\r\n0\r\n\r\n")
    return begin, Part(b"0", rng.choice((20, 1_000_000))), Part(b"5\r\nhello\r\n0\r\n\r\n")


def line_ends(data: bytes, rng: Random) -> Parts:
    """Bare CR or LF in the place of one line end, or of all."""
    end = rng.choice((b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\0\r\n"))
    head, blank, body = data.partition(b"\r\n\r\n")
    if rng.random() < 0.5:
        return single_part(head.replace(b"\r\n", end) + blank + body)
    return single_part(head.replace(b"\r\n", end, 1) + rng.choice((blank, end * 2)) + body)


def header_values(data: bytes, rng: Random) -> Parts:
    found = list(_HEADER.finditer(data.partition(b"\r\n\r\n")[0] + b"\r\n"))
    if not found:
        return splice(data, rng)
    place = rng.choice(found)
    return single_part(data[: place.start(2)] + rng.choice(JUNK) + data[place.end(2) :])


def packed(data: bytes, rng: Random) -> Parts:
    """A body that is far larger than it looks, or is not packed as it says."""
    head, _, body = data.partition(b"\r\n\r\n")
    head = re.sub(rb"\r\nContent-Length:[^\r]*", b"", head, flags=re.IGNORECASE)
    bombs = (
        *(body, b"[" + b"[]," * 300_000 + b"0]", b'{"model":"m","x":"' + b" " * (32 << 20) + b'"}'),
        *(b'{"model":"m","messages":[' + b"[]," * 500_000 + b"0]}", gzip.compress(b"0" * (1 << 20), mtime=0)),
    )
    zipped = gzip.compress(rng.choice(bombs), 9, mtime=0)
    if rng.random() < 0.3:
        zipped = zipped[: rng.randrange(len(zipped))] + rng.choice((b"", b"\0", zipped))
    coding = rng.choice((b"gzip", b"gzip", b"deflate", b"br", b"gzip, gzip", b"x-gzip", b"identity, gzip"))
    return single_part(
        head + b"\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (coding, len(zipped)) + zipped
    )


def pipelined(data: bytes, rng: Random) -> Parts:
    return (Part(data, rng.choice((2, 20, 300))),)


HTTP: tuple[Mutator, ...] = (
    *(header_without_end, header_without_end, many_headers, lengths, lengths, chunks, chunks, chunks),
    *(line_ends, header_values, packed, pipelined),
)


def mutate(target: str, seeds: Sequence[bytes], rng: Random, *, http: bool) -> Case:
    """A case for this target. Some are mutated twice."""
    data = rng.choice(seeds)
    mutators = [*GENERAL, *(HTTP * 2 if http else ())]
    chosen = rng.choice(mutators)
    parts = chosen(data, rng)
    names = [chosen.__name__]
    if rng.random() < 0.3 and sum(part.size for part in parts) < 64 << 10 and not any(part.apart for part in parts):
        chosen = rng.choice(mutators)
        parts = chosen(b"".join(part.data * part.times for part in parts), rng)
        names.append(chosen.__name__)
    return Case(target, tuple(part for part in parts if part.data and part.times > 0), " then ".join(names))
