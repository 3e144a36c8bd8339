"""The control socket of an ``ssh`` master, spoken to directly (OpenSSH's PROTOCOL.mux, version 4): an order costs a
message, not a process that first has to load its libraries.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

from gpumesh.printable import printable
from gpumesh.topology import Target

VERSION = 4
LONGEST = 1 << 18

_HELLO = 0x00000001
_ALIVE_CHECK, _OPEN_FORWARD = 0x10000004, 0x10000006
_OK, _DENIED, _FAILURE, _ALIVE = 0x80000001, 0x80000002, 0x80000003, 0x80000005
_LOCAL = 1
_UNIX_SOCKET = 0xFFFFFFFE  # in place of a port: the host before it is a path


class MuxError(Exception):
    """The master refuses, or does not answer as one. Its text is safe to print."""


async def open_forwards(control: Path, routes: list[tuple[Path, Target]]) -> None:
    """Has the master listen at each path, for what is then forwarded to its target. Raises ``MuxError``."""
    messages = [
        struct.pack(">III", _OPEN_FORWARD, number, _LOCAL)
        + _string(str(path))
        + struct.pack(">I", _UNIX_SOCKET)
        + _string(target.host)
        + struct.pack(">I", target.port)
        for number, (path, target) in enumerate(routes)
    ]
    for kind, rest in await _talk(control, messages):
        if kind != _OK:
            raise MuxError(_reason(kind, rest))


async def is_master_alive(control: Path) -> bool:
    """Whether the master is there and answers."""
    try:
        ((kind, _),) = await _talk(control, [struct.pack(">II", _ALIVE_CHECK, 0)])
    except MuxError:
        return False
    return kind == _ALIVE


async def _talk(control: Path, messages: list[bytes]) -> list[tuple[int, bytes]]:
    """The answers to ``messages``: each its kind, and what follows the request's number."""
    try:
        reader, writer = await asyncio.open_unix_connection(control)
    except OSError as error:
        raise MuxError(f"nobody answers at its control socket ({error.strerror})") from error
    try:
        hello = struct.pack(">II", _HELLO, VERSION)
        for message in (hello, *messages):
            writer.write(struct.pack(">I", len(message)) + message)
        kind, version = struct.unpack_from(">II", await _packet(reader))
        if kind != _HELLO or version != VERSION:
            raise MuxError(f"it speaks another version of the protocol ({version})")
        answers = []
        for number in range(len(messages)):
            packet = await _packet(reader)
            kind, answered = struct.unpack_from(">II", packet)
            if answered != number:
                raise MuxError("it answered something else")
            answers.append((kind, packet[8:]))
        return answers
    except (OSError, EOFError, struct.error) as error:
        raise MuxError("it ended the talk on its control socket") from error
    finally:
        writer.close()


async def _packet(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    if length > LONGEST:
        raise MuxError("it said something far too long")
    return await reader.readexactly(length)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack(">I", len(raw)) + raw


def _reason(kind: int, rest: bytes) -> str:
    if kind not in (_DENIED, _FAILURE):
        return f"it answered {kind:#x}"
    return printable(rest[4:]) or "it gives no reason"
