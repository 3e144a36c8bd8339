"""Reads an ssh command line, as providers print it, by the rules of ssh itself. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.config import providers
from gpumesh.errors import UsageError

_OPTIONS_WITH_VALUE = "BbcDEeFIiJLlmOopQRSWw"  # the letters of ssh(1)
_GIVEN_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]{0,62})=(?=\s*\S)")
_FORWARD = re.compile(r":(?:localhost|127\.0\.0\.1|\[::1\]):(\d{1,5})$")
# `-o KEY=VALUE`: the keys of ssh_config(5) that are read, in lower case -> the field of SshLine.
_CONFIG_OPTIONS = {"port": "port", "user": "user", "identityfile": "identity", "proxyjump": "jump"}


@dataclass(frozen=True, slots=True)
class SshLine:
    """``forwarded_ports``: the ports of the host that the line forwards with ``-L``. The server that the person wants
    is probably at one of them."""

    host: str
    port: int = 22
    user: str | None = None
    identity: str | None = None
    jump: str | None = None
    forwarded_ports: tuple[int, ...] = ()
    given_name: str | None = None

    @property
    def name(self) -> str:
        """The name of the node: the given name, else the letters, digits and hyphens of the host."""
        if self.given_name is not None:
            return self.given_name
        name = re.sub(r"[^a-z0-9]+", "-", self.host.lower()).strip("-")
        return f"host-{name}" if not name or name[0].isdigit() else name


def parse_ssh_line(line: str) -> SshLine:
    """``ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id``. The word ``ssh`` may be missing, and a name for the node may come
    first (``iceland=ssh …``). A command at the end is ignored. Raises UsageError."""
    given_name = _GIVEN_NAME.match(line)
    if given_name is not None:
        return replace(parse_ssh_line(line[given_name.end() :]), given_name=given_name[1])
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line!r}: {error}") from error
    if words and words[0].rsplit("/", 1)[-1] == "ssh":
        words = words[1:]
    options: dict[str, str] = {}
    forwards: list[str] = []
    destination: str | None = None
    remaining_words = iter(words)
    for word in remaining_words:
        if not word.startswith("-") or word == "-":
            if destination is not None:
                break  # the rest is a command to run on the host
            destination = word
            continue
        _read_option(word, remaining_words, options, forwards, line)
    if destination is None:
        raise UsageError(f"{line!r} names no host", hint="for example --from 'ssh root@203.0.113.7 -p 13323'")
    return replace(_make_line(destination, options, line), forwarded_ports=tuple(_remote_ports(forwards)))


def _remote_ports(forwards: Sequence[str]) -> Iterator[int]:
    """The last port of ``[bind:]port:host:hostport``, where ``host`` is the remote host itself."""
    for forward in forwards:
        match = _FORWARD.search(forward)
        if match is not None and 1 <= int(match[1]) <= 65535:
            yield int(match[1])


def _read_option(
    word: str, remaining_words: Iterator[str], options: dict[str, str], forwards: list[str], line: str
) -> None:
    """A word of option letters. The first letter that takes a value takes the rest of the word, or the next
    word."""
    for position, letter in enumerate(word[1:], 1):
        if letter not in _OPTIONS_WITH_VALUE:
            continue
        value = word[position + 1 :] or next(remaining_words, None)
        if value is None:
            raise UsageError(f"{line!r}: -{letter} needs a value")
        option = {"p": "port", "l": "user", "i": "identity", "J": "jump"}.get(letter)
        if option is not None:
            options[option] = value
        elif letter == "L":
            forwards.append(value)
        elif letter == "o":
            key, _, setting = value.replace("=", " ", 1).partition(" ")
            if key.lower() in _CONFIG_OPTIONS:
                options.setdefault(_CONFIG_OPTIONS[key.lower()], setting.strip())
        return


def _make_line(destination: str, options: dict[str, str], line: str) -> SshLine:
    """``destination`` is ``[user@]host``, or an ``ssh://`` URL. Its user goes before ``-l``, but ``-p`` before its
    port. Raises UsageError."""
    if destination.startswith("ssh://"):
        destination = destination.removeprefix("ssh://").rstrip("/")
        head, colon, port = destination.rpartition(":")
        if colon and port.isdecimal():
            destination, options = head, {"port": port, **options}
    user, at, host = destination.rpartition("@")
    port = options.get("port", "22")
    if not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= 65535:
        raise UsageError(f"{line!r}: {port!r} is not a port")
    if not host:
        raise UsageError(f"{line!r} names no host")
    proxy = providers.describe_terminal_proxy(host)
    if proxy is not None:
        raise UsageError(proxy, hint=providers.EXPOSED_TCP_HINT)
    return SshLine(
        host=host.strip("[]"),
        port=int(port),
        user=user if at else options.get("user"),
        identity=options.get("identity"),
        jump=options.get("jump"),
    )
