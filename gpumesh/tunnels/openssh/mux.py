"""Opens forwards and pings at an ``ssh`` master's control socket (OpenSSH's PROTOCOL.mux, version 4).

A request is one message, which is quick: an ``ssh -O`` process for each request would first have to load its libraries.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

from gpumesh.text.printable import printable
from gpumesh.topology import Target

VERSION = 4
MAX_PACKET_BYTES = 1 << 18  # far more than any answer here needs

# The types of messages: greeting, requests, answers. Then a type of forward.
_HELLO = 0x00000001
_ALIVE_CHECK, _OPEN_FORWARD = 0x10000004, 0x10000006
_OK, _DENIED, _FAILURE, _ALIVE = 0x80000001, 0x80000002, 0x80000003, 0x80000005
_LOCAL, _REMOTE = 1, 2
_UNIX_SOCKET = 0xFFFFFFFE  # in the place of a port: the field before it, the host, is then a path


class MuxError(Exception):
    """The master refuses a request, or does not speak this protocol. The text is safe to print."""


async def open_forwards(control: Path, routes: list[tuple[Path, Target]]) -> None:
    """Makes the master listen at each path and forward to the path's target. Raises ``MuxError``."""
    # Message type, request number, type of forward; then host and port to listen at, and host and port to reach.
    messages = [
        struct.pack(">III", _OPEN_FORWARD, request_id, _LOCAL)
        + _encode_string(str(path))
        + struct.pack(">I", _UNIX_SOCKET)
        + _encode_string(target.host)
        + struct.pack(">I", target.port)
        for request_id, (path, target) in enumerate(routes)
    ]
    for answer_type, content in await _exchange(control, messages):
        if answer_type != _OK:
            raise MuxError(_refusal_reason(answer_type, content))


async def open_reverse_forward(control: Path, address: str, port: int, path: Path) -> None:
    """Makes the host listen at ``address`` and ``port``, and the master forward to the Unix socket at ``path``. Raises
    ``MuxError``."""
    message = (
        struct.pack(">III", _OPEN_FORWARD, 0, _REMOTE)  # 0: the request number
        + _encode_string(address)
        + struct.pack(">I", port)
        + _encode_string(str(path))
        + struct.pack(">I", _UNIX_SOCKET)
    )
    [(answer_type, content)] = await _exchange(control, [message])
    if answer_type != _OK:
        raise MuxError(_refusal_reason(answer_type, content))


async def is_master_alive(control: Path) -> bool:
    """Pings the master, and returns whether it answers."""
    try:
        answers = await _exchange(control, [struct.pack(">II", _ALIVE_CHECK, 0)])  # 0: the request number
    except MuxError:
        return False
    [(answer_type, _content)] = answers
    return answer_type == _ALIVE


async def _exchange(control: Path, messages: list[bytes]) -> list[tuple[int, bytes]]:
    """Sends ``messages``, whose request numbers count from 0, and returns the type and the content of each answer.

    The content is what follows the request number. Raises ``MuxError``.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(control)
    except OSError as error:
        raise MuxError(f"nobody answers at its control socket ({error.strerror})") from error
    try:
        hello = struct.pack(">II", _HELLO, VERSION)
        for message in (hello, *messages):
            writer.write(struct.pack(">I", len(message)) + message)
        answer_type, version = struct.unpack_from(">II", await _read_packet(reader))
        if answer_type != _HELLO or version != VERSION:
            raise MuxError(f"it speaks another version of the protocol ({version})")
        answers = []
        for request_id in range(len(messages)):
            packet = await _read_packet(reader)
            answer_type, answered_id = struct.unpack_from(">II", packet)
            if answered_id != request_id:
                raise MuxError("it answered something else")
            answers.append((answer_type, packet[8:]))  # 8: the bytes of the answer's type and request number
        return answers
    except (OSError, EOFError, struct.error) as error:
        raise MuxError("it ended the talk on its control socket") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # of a connection that was reset: asyncio reports an error that nobody takes
            await writer.wait_closed()


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    """Reads one message: four bytes with its length, then its bytes, which are returned."""
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    if length > MAX_PACKET_BYTES:
        raise MuxError("it said something far too long")
    return await reader.readexactly(length)


def _encode_string(text: str) -> bytes:
    """A string in SSH's form: four bytes with its length, then its bytes."""
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack(">I", len(raw)) + raw


def _refusal_reason(answer_type: int, content: bytes) -> str:
    """The reason in an answer that is not ``_OK``; safe to print."""
    if answer_type not in (_DENIED, _FAILURE):
        return f"it answered {answer_type:#x}"
    reason = content[4:]  # after the reason's length
    return printable(reason) or "it gives no reason"
