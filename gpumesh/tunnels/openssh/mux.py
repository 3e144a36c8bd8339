"""A client of an ``ssh`` master's control socket (OpenSSH's PROTOCOL.mux, version 4).

A request is one message. The alternative, an ``ssh -O`` process for each request, first has to load its libraries.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

from gpumesh.printable import printable
from gpumesh.topology import Target

VERSION = 4
MAX_PACKET_BYTES = 1 << 18

_HELLO = 0x00000001
_ALIVE_CHECK, _OPEN_FORWARD = 0x10000004, 0x10000006
_OK, _DENIED, _FAILURE, _ALIVE = 0x80000001, 0x80000002, 0x80000003, 0x80000005
_LOCAL = 1
_UNIX_SOCKET = 0xFFFFFFFE  # in the place of a port: the field before it, the host, is then a path


class MuxError(Exception):
    """The master refuses a request, or does not speak this protocol. The text is safe to print."""


async def open_forwards(control: Path, routes: list[tuple[Path, Target]]) -> None:
    """Makes the master listen at each path and forward to the path's target. Raises ``MuxError``."""
    messages = [
        struct.pack(">III", _OPEN_FORWARD, request_id, _LOCAL)
        + _encode_string(str(path))
        + struct.pack(">I", _UNIX_SOCKET)
        + _encode_string(target.host)
        + struct.pack(">I", target.port)
        for request_id, (path, target) in enumerate(routes)
    ]
    for kind, rest in await _exchange(control, messages):
        if kind != _OK:
            raise MuxError(_refusal_reason(kind, rest))


async def is_master_alive(control: Path) -> bool:
    """Whether the master is there and answers."""
    try:
        ((kind, _),) = await _exchange(control, [struct.pack(">II", _ALIVE_CHECK, 0)])
    except MuxError:
        return False
    return kind == _ALIVE


async def _exchange(control: Path, messages: list[bytes]) -> list[tuple[int, bytes]]:
    """Sends ``messages``. For each, the kind of the answer and its content after the request's number. Raises
    ``MuxError``."""
    try:
        reader, writer = await asyncio.open_unix_connection(control)
    except OSError as error:
        raise MuxError(f"nobody answers at its control socket ({error.strerror})") from error
    try:
        hello = struct.pack(">II", _HELLO, VERSION)
        for message in (hello, *messages):
            writer.write(struct.pack(">I", len(message)) + message)
        kind, version = struct.unpack_from(">II", await _read_packet(reader))
        if kind != _HELLO or version != VERSION:
            raise MuxError(f"it speaks another version of the protocol ({version})")
        answers = []
        for request_id in range(len(messages)):
            packet = await _read_packet(reader)
            kind, answered_id = struct.unpack_from(">II", packet)
            if answered_id != request_id:
                raise MuxError("it answered something else")
            answers.append((kind, packet[8:]))
        return answers
    except (OSError, EOFError, struct.error) as error:
        raise MuxError("it ended the talk on its control socket") from error
    finally:
        writer.close()


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    if length > MAX_PACKET_BYTES:
        raise MuxError("it said something far too long")
    return await reader.readexactly(length)


def _encode_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack(">I", len(raw)) + raw


def _refusal_reason(kind: int, rest: bytes) -> str:
    if kind not in (_DENIED, _FAILURE):
        return f"it answered {kind:#x}"
    return printable(rest[4:]) or "it gives no reason"
