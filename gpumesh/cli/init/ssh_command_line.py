"""An ssh command line as providers print it, read as ssh would read it. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.config import providers
from gpumesh.errors import UsageError

_WITH_VALUE = "BbcDEeFIiJLlmOopQRSWw"  # ssh(1)'s options that take one
_NAMED = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]{0,62})=(?=\s*\S)")
_FORWARD = re.compile(r":(?:localhost|127\.0\.0\.1|\[::1\]):(\d{1,5})$")
_PORT_OPTIONS = {"port": "port", "user": "user", "identityfile": "identity", "proxyjump": "jump"}


@dataclass(frozen=True, slots=True)
class SshLine:
    """``forwarded_ports``: the host's own ports to which the line's ``-L`` lead: what the person wants is probably
    there."""

    host: str
    port: int = 22
    user: str | None = None
    identity: str | None = None
    jump: str | None = None
    forwarded_ports: tuple[int, ...] = ()
    given_name: str | None = None

    @property
    def name(self) -> str:
        """A node's name for it: what it is called, else letters, digits and hyphens of its host."""
        if self.given_name is not None:
            return self.given_name
        name = re.sub(r"[^a-z0-9]+", "-", self.host.lower()).strip("-")
        return f"host-{name}" if not name or name[0].isdigit() else name


def parse_ssh_line(line: str) -> SshLine:
    """``ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id`` and its like; the word ``ssh`` may be missing, a name for it may
    stand first (``iceland=ssh …``). A command at the end is passed over. Raises UsageError."""
    called = _NAMED.match(line)
    if called is not None:
        return replace(parse_ssh_line(line[called.end() :]), given_name=called[1])
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line!r}: {error}") from error
    if words and words[0].rsplit("/", 1)[-1] == "ssh":
        words = words[1:]
    found: dict[str, str] = {}
    forwards: list[str] = []
    place: str | None = None
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            if place is not None:
                break  # a command to run there
            place = word
            continue
        _option(word, rest, found, forwards, line)
    if place is None:
        raise UsageError(f"{line!r} names no host", hint="for example --from 'ssh root@203.0.113.7 -p 13323'")
    return replace(_line(place, found, line), forwarded_ports=tuple(_remote_ports(forwards)))


def _remote_ports(forwards: Sequence[str]) -> Iterator[int]:
    """``[bind:]port:host:hostport``, of those that lead to the host itself."""
    for forward in forwards:
        match = _FORWARD.search(forward)
        if match is not None and 1 <= int(match[1]) <= 65535:
            yield int(match[1])


def _option(word: str, rest: Iterator[str], found: dict[str, str], forwards: list[str], line: str) -> None:
    """One group of letters; the first that takes a value takes what is left of the word, or the next one."""
    for position, letter in enumerate(word[1:], 1):
        if letter not in _WITH_VALUE:
            continue
        value = word[position + 1 :] or next(rest, None)
        if value is None:
            raise UsageError(f"{line!r}: -{letter} needs a value")
        named = {"p": "port", "l": "user", "i": "identity", "J": "jump"}.get(letter)
        if named is not None:
            found[named] = value
        elif letter == "L":
            forwards.append(value)
        elif letter == "o":
            key, _, setting = value.replace("=", " ", 1).partition(" ")
            if key.lower() in _PORT_OPTIONS:
                found.setdefault(_PORT_OPTIONS[key.lower()], setting.strip())
        return


def _line(place: str, found: dict[str, str], line: str) -> SshLine:
    if place.startswith("ssh://"):
        place = place.removeprefix("ssh://").rstrip("/")
        head, colon, port = place.rpartition(":")
        if colon and port.isdecimal():
            place, found = head, {"port": port, **found}
    user, at, host = place.rpartition("@")
    port = found.get("port", "22")
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
        user=user if at else found.get("user"),
        identity=found.get("identity"),
        jump=found.get("jump"),
    )
