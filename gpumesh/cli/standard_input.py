"""Reads what a command is given as its input: a file, standard input that is piped, or text typed at a terminal."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

import typer

from gpumesh.errors import UsageError

# A program may leave our standard input open without ever writing to it. After this time a remark says what we wait
# for.
QUIET_INPUT_S = 2.0
_READ_SIZE = 1 << 16


@contextmanager
def open_rereadable(name: str) -> Iterator[BinaryIO]:
    """Opens the file, or standard input for ``-``, for a caller that reads it more than once.

    A pipe can be read only once. So it is copied, to its end, into a temporary file without a name, which is gone
    when the block ends. Yields a file that is to be read from its present position. Raises UsageError if the file
    cannot be read."""
    if name == "-" and sys.stdin.isatty():
        _announce_terminal()
    with ExitStack() as stack:
        try:
            path = sys.stdin.fileno() if name == "-" else name
            source = stack.enter_context(open(path, "rb", closefd=name != "-"))  # standard input stays open
            is_regular_file = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
        except OSError as error:
            raise UsageError(f"cannot read {name}: {error.strerror}") from error
        if not is_regular_file:
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, copy)
            copy.seek(0)
            source = copy  # type: ignore[assignment]
        yield source


def read_piped_text() -> str:
    """All of standard input, which is no terminal. If nothing comes for a while, a remark on stderr says so."""
    if sys.platform != "win32":  # there, select knows sockets only
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], QUIET_INPUT_S)
        if not readable:
            typer.echo("waiting for standard input to end; `< /dev/null` gives it none", err=True)
    return sys.stdin.buffer.read().decode("utf-8", "replace")


async def read_terminal_text() -> str:
    """What a person types at the terminal up to Ctrl-D. The event loop goes on meanwhile, with all tunnels."""
    _announce_terminal()
    if sys.platform == "win32":  # its event loop cannot wait for a console
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()
    pieces: list[bytes] = []
    ended = loop.create_future()

    def read() -> None:
        try:
            piece = os.read(descriptor, _READ_SIZE)
        except OSError:  # EIO: the terminal has gone
            piece = b""
        pieces.append(piece)
        if not piece and not ended.done():
            ended.set_result(None)

    loop.add_reader(descriptor, read)
    try:
        await ended
    finally:
        loop.remove_reader(descriptor)
    return b"".join(pieces).decode("utf-8", "replace")


def _announce_terminal() -> None:
    typer.echo("reading from the terminal; Ctrl-D ends the input", err=True)
