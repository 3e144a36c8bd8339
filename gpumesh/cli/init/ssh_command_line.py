"""Reads an ssh command line, as providers print it, by the rules of ssh itself. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gpumesh.config import providers
from gpumesh.errors import UsageError

_OPTIONS_WITH_VALUE = "BbcDEeFIiJLlmOopQRSWw"  # the letters of ssh(1)
_GIVEN_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]{0,62})=(?=\s*\S)")  # `iceland=ssh …`
_FORWARD = re.compile(r":(?:localhost|127\.0\.0\.1|\[::1\]):(\d{1,5})$")  # the end of `-L 8080:localhost:11434`
# The options that are read, and the fields of SshLine that they set.
_FIELD_BY_LETTER = {"p": "port", "l": "user", "i": "identity", "J": "jump"}
# The keys of `-o KEY=VALUE`, in lower case; ssh_config(5) describes them.
_FIELD_BY_CONFIG_KEY = {"port": "port", "user": "user", "identityfile": "identity", "proxyjump": "jump"}


@dataclass(frozen=True, slots=True)
class SshLine:
    """The parts of an ssh command line that `init` and `node add` use.

    - ``identity``: the key file of ``-i``. ``jump``: the jump hosts of ``-J``.
    - ``forwarded_ports``: the ports of the host that the line forwards with ``-L``. The server that the person wants is
      probably at one of these ports.
    - ``given_name``: the name for the node that a person wrote before the line.
    - ``is_alias``: ``host`` is a Host of ~/.ssh/config, which has all the rest.
    """

    host: str
    port: int = 22
    user: str | None = None
    identity: str | None = None
    jump: str | None = None
    forwarded_ports: tuple[int, ...] = ()
    given_name: str | None = None
    is_alias: bool = False

    @property
    def name(self) -> str:
        """The name of the node: the given name, else the host in lower case, with a hyphen between its parts of letters
        and digits: ``gpu1.example.com`` becomes ``gpu1-example-com``. If the host does not begin with a letter,
        ``host-`` comes first, so that the name does not look like a number: ``host-203-0-113-7``."""
        if self.given_name is not None:
            return self.given_name
        name = re.sub(r"[^a-z0-9]+", "-", self.host.lower()).strip("-")
        begins_with_letter = name[:1].isalpha()
        return name if begins_with_letter else f"host-{name}"


def parse_ssh_line(line: str) -> SshLine:
    """Reads a line such as ``ssh root@203.0.113.7 -p 13323 -i ~/.ssh/id``. A name for the node may come first
    (``iceland=ssh …``). A command at the end is ignored.

    Forgives what ssh would not: the word ``ssh`` may be missing, the port may stand behind the host (``root@host:22``,
    ``root@host 22``), and a pasted line may still have its prompt or its quotes. Raises UsageError for a line without a
    host, and for an option without its value or with a wrong one."""
    line = _strip_paste(line)
    name_match = _GIVEN_NAME.match(line)
    if name_match is not None:
        return replace(parse_ssh_line(line[name_match.end() :]), given_name=name_match[1])
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line!r}: {error}") from error
    if words and (words[0] == "ssh" or words[0].endswith("/ssh")):  # the program's name, or its path
        words = words[1:]
    options: dict[str, str] = {}
    forwards: list[str] = []
    host: str | None = None
    remaining_words = iter(words)
    for word in remaining_words:
        is_option = word.startswith("-") and word != "-"
        if is_option:
            _read_option(word, remaining_words, options, forwards, line)
        elif host is None:
            host = _read_destination(word, options)
        else:
            is_port = word.isascii() and word.isdecimal() and next(remaining_words, None) is None
            if is_port:  # ``host 22``; otherwise the rest is a command to run on the host
                options.setdefault("port", word)
            break
    if host is None:
        raise UsageError(f"{line!r} names no host", hint="for example 'ssh root@203.0.113.7 -p 13323'")
    return replace(_make_line(host, options, line), forwarded_ports=tuple(_remote_ports(forwards)))


def _strip_paste(line: str) -> str:
    """The line without the prompt of a shell (``$ ssh …``) and without quotes around the whole."""
    line = line.strip().removeprefix("$ ").lstrip()
    quote = line[:1]
    if len(line) > 1 and quote in ("'", '"', "`") and line.endswith(quote) and line.count(quote) == 2:
        line = line[1:-1].strip()
    return line


def _remote_ports(forwards: Sequence[str]) -> Iterator[int]:
    """Yields ``hostport`` of each ``[bind:]port:host:hostport`` in which ``host`` is the remote host itself, as in
    ``8080:localhost:11434``."""
    for forward in forwards:
        match = _FORWARD.search(forward)
        port = 0 if match is None else int(match[1])  # 0 is left out below
        if 1 <= port <= 65535:
            yield port


def _read_option(
    word: str, remaining_words: Iterator[str], options: dict[str, str], forwards: list[str], line: str
) -> None:
    """Reads a word of option letters, as ``-4p``. Adds its value to ``options`` (by the field of SshLine), or the value
    of ``-L`` to ``forwards``. The first letter that takes a value takes the rest of the word (``-4p22``), or, if
    nothing is left of the word, the next word (``-4p 22``). If a field has two values, the first counts, as in ssh.
    ``line``: the whole line, for the UsageError if there is no value."""
    for position, letter in enumerate(word[1:], 1):
        if letter not in _OPTIONS_WITH_VALUE:  # a switch such as ``-4``, which `init` does not need
            continue
        value = word[position + 1 :] or next(remaining_words, None)
        if value is None:
            raise UsageError(f"{line!r}: -{letter} needs a value")
        if letter in _FIELD_BY_LETTER:
            options.setdefault(_FIELD_BY_LETTER[letter], value)
        elif letter == "L":
            forwards.append(value)
        elif letter == "o":
            key, _, setting = value.replace("=", " ", 1).partition(" ")  # ``Port=22`` or ``Port 22``
            field = _FIELD_BY_CONFIG_KEY.get(key.lower())
            if field is not None:
                options.setdefault(field, setting.strip())
        return


def _read_destination(destination: str, options: dict[str, str]) -> str:
    """Returns the host of a destination, which is ``[user@]host`` or an ``ssh://`` URL. Adds its user and its port to
    ``options``, unless an option before it has given them: as in ssh, the first value counts."""
    if destination.startswith("ssh://"):
        destination = destination.removeprefix("ssh://").rstrip("/")
        address, colon, url_port = destination.rpartition(":")
        if colon and url_port.isdecimal():
            destination = address
            options.setdefault("port", url_port)
    user, at_sign, host = destination.rpartition("@")
    if at_sign:
        options.setdefault("user", user)
    name, colon, port = host.rpartition(":")
    is_bracketed_or_name = ":" not in name or name.endswith("]")  # ``::1`` is an IPv6 address, and names no port
    if colon and name and is_bracketed_or_name and port.isascii() and port.isdecimal():
        options["port_of_host"] = port
        return name
    return host


def _make_line(host: str, options: dict[str, str], line: str) -> SshLine:
    """The SshLine of a host, and of options by the field of SshLine. Raises UsageError for an empty host, for a port
    that is none, and for a provider's terminal proxy, which forwards no ports. ``line``: the whole line, for these
    errors."""
    port_of_host = options.get("port_of_host", "22")
    port = options.get("port", port_of_host)
    if "port_of_host" in options and port != port_of_host:
        raise UsageError(f"{line!r} names two ports: {port_of_host} and {port}")
    is_number = port.isascii() and port.isdecimal()
    if not is_number or not 1 <= int(port) <= 65535:
        raise UsageError(f"{line!r}: {port!r} is not a port")
    if not host:
        raise UsageError(f"{line!r} names no host")
    proxy = providers.describe_terminal_proxy(host)
    if proxy is not None:
        raise UsageError(proxy, hint=providers.EXPOSED_TCP_HINT)
    return SshLine(
        host=host.strip("[]"),
        port=int(port),
        user=options.get("user"),
        identity=options.get("identity"),
        jump=options.get("jump"),
    )
