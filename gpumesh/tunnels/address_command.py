"""Runs a node's ``address_from`` command, and parses the address that it prints (a pod's changes with each restart)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from typing import IO

from gpumesh.config.credentials import mask_secrets
from gpumesh.errors import HostUnresolved
from gpumesh.text import quoting
from gpumesh.topology import AddressCommand
from gpumesh.tunnels.local_system.local_command import local_command, read_at_most
from gpumesh.tunnels.remote_commands.host_text import add_host_text

_MAX_OUTPUT_BYTES = 64 * 1024
_MAX_ERROR_BYTES = 8 * 1024
_MAX_ERROR_LINES = 5
# Letters, digits, dots, hyphens, underscores, and for IPv6 colons and a zone. A hyphen is never first: otherwise a
# program could take the host for an option.
_HOST_PATTERN = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,252}")
_BRACKETED_ADDRESS = re.compile(r"\[([^\]]+)\](?::(\d{1,5}))?")
_PORT_PATTERN = re.compile(r"\d{1,5}")


def parse_address(text: str, *, default_port: int) -> tuple[str, int]:
    """Parses ``host port``, ``host:port``, ``[v6]:port``, ``host`` or JSON with ``host`` and ``port``.

    Returns host and port, which is ``default_port`` if the text has no port. Raises ``ValueError`` with a sentence that
    says what is wrong, and that repeats at most 80 characters of the text.
    """
    text = text.strip()
    if not text:
        raise ValueError("it printed nothing")
    if text.startswith("{"):
        host, port = _parse_json(text)
    else:
        host, port = _parse_fields(text)
    if not _HOST_PATTERN.fullmatch(host):
        raise ValueError(f"{host[:80]!r} is not a host name or address")
    port = default_port if port is None else port
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} is not between 1 and 65535")
    return host, port


def _parse_json(text: str) -> tuple[str, int | None]:
    """Host and port from a JSON object; port ``None``: the object has no ``port``. Raises ``ValueError``."""
    # The messages say "yet" because a pod's API may answer with null for host or port until the pod has started.
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("it printed something like JSON that cannot be read") from error
    host = document.get("host") if isinstance(document, dict) else None
    if not isinstance(host, str) or not host:
        raise ValueError("its JSON has no `host` yet")
    if "port" not in document:
        return host, None
    port = document["port"]
    if isinstance(port, str) and _PORT_PATTERN.fullmatch(port):
        port = int(port)
    if isinstance(port, bool) or not isinstance(port, int):  # in Python, True is an int too
        raise ValueError("its JSON has no `port` yet")  # noqa: TRY004 - the command's output is wrong, not our call
    return host, port


def _parse_fields(text: str) -> tuple[str, int | None]:
    """Host and port from text that is no JSON; port ``None``: the text has no port. Raises ``ValueError``."""
    fields = text.split()
    if len(fields) == 2:  # ``host port``
        host, port = fields
        if not _PORT_PATTERN.fullmatch(port):
            raise ValueError(f"{port[:80]!r} is not a port")
        return host.strip("[]"), int(port)  # also ``[v6] port``
    if len(fields) != 1:
        raise ValueError(f"expected `host port`, got {len(fields)} words")
    if bracketed := _BRACKETED_ADDRESS.fullmatch(text):
        host, port = bracketed.groups()
        port_number = None if port is None else int(port)
        return host, port_number
    host, colon, port = text.partition(":")
    if not colon or ":" in port:  # ``host``, or an IPv6 address without brackets
        return text, None
    if not _PORT_PATTERN.fullmatch(port):
        raise ValueError(f"{port[:80]!r} is not a port")
    return host, int(port)


async def ask_address(command: AddressCommand, *, default_port: int, node: str) -> tuple[str, int]:
    """Runs the command (an argument list, without a shell), and returns the host and the port that the command prints.

    Raises HostUnresolved, which is retried, when the command fails, takes longer than its ``timeout_s`` or prints no
    address. The command and all processes that it started are ended in any case.
    """
    # A file instead of a pipe: a process that the command leaves behind could keep a pipe open.
    with tempfile.TemporaryFile() as stderr:
        try:
            return await _run_command(command, stderr, default_port, node)
        except HostUnresolved as error:
            raise add_host_text(error, _read_last_lines(stderr)) from error


async def _run_command(command: AddressCommand, stderr: IO[bytes], default_port: int, node: str) -> tuple[str, int]:
    """Like ``ask_address``. ``stderr`` is the file for the command's stderr, which the errors do not quote."""
    program = command.command[0]
    quoted_name = quoting.paste_command("{COMMAND}", COMMAND=program)
    hint = f"run {quoted_name} by hand: it must print `host port`, or JSON with host and port, and exit 0"
    try:
        async with local_command(command.command, stderr=stderr) as process, asyncio.timeout(command.timeout_s):
            # Output above the limit is dropped: it cannot be part of an address.
            printed, _truncated = await read_at_most(process.stdout, _MAX_OUTPUT_BYTES)
            status = await process.wait()
    except TimeoutError as error:
        message = f"address_from: {program!r} did not answer within {command.timeout_s:g} s"
        raise HostUnresolved(message, hint=hint, node=node) from error
    except (OSError, ValueError) as error:  # ValueError: an argument holds a NUL
        reason = error.strerror if isinstance(error, OSError) else "it holds a NUL"
        raise HostUnresolved(f"address_from: cannot run {program!r}: {reason}", hint=hint, node=node) from error
    if status != 0:
        raise HostUnresolved(f"address_from: {program!r} failed with exit status {status}", hint=hint, node=node)
    try:
        return parse_address(printed.decode("utf-8", "replace"), default_port=default_port)
    except ValueError as error:
        raise HostUnresolved(f"address_from: {program!r}: {error}", hint=hint, node=node) from error


def _read_last_lines(file: IO[bytes]) -> list[str]:
    """The last lines of the command's stderr, which say why, without the secrets of the environment: a script may show
    what it sends."""
    dropped_bytes = max(0, file.seek(0, os.SEEK_END) - _MAX_ERROR_BYTES)
    file.seek(dropped_bytes)
    lines = mask_secrets(file.read().decode("utf-8", "replace")).splitlines()
    if dropped_bytes:
        lines = lines[1:]  # the first line is cut, perhaps within a secret
    return lines[-_MAX_ERROR_LINES:]
