"""Parses single values of mesh.yaml and the command line: durations, URLs, jump hosts, commands. Pure.

Each function raises ValueError. Its text completes a sentence that begins with the value, and repeats at most digits of
the value: a user may have written a secret in the wrong place.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import shlex
from collections.abc import Callable, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from gpumesh.pool_spec import is_model_path
from gpumesh.topology import RequestRate, Target

_N = TypeVar("_N", int, float)

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}  # in seconds
_TRUTH_VALUES = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
_DURATION = re.compile(r"(?P<number>\d{1,9}(?:\.\d{1,6})?)\s*(?P<unit>ms|s|m|h)")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")
_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")
_SHELL_CHARACTERS = re.compile(r"""['"`;&<>|(){}]|\\$""")
_USER = re.compile(r"[^\s\x00-\x20\x7f-\x9f,-][^\s\x00-\x20\x7f-\x9f,]{0,127}")
_SCHEME_PORTS = {"http": 80, "https": 443}
# The SHA-256 of an empty text and of an empty line, as the shell makes them from a variable that is not set.
_HASHES_OF_NOTHING = frozenset(hashlib.sha256(text).hexdigest() for text in (b"", b"\n"))
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
SHA256_PATTERN = r"^[0-9A-Fa-f]{64}$"
RATE_PATTERN = r"^[0-9]{1,9}(\s*/\s*[smhd])?$"
TOKENS_PATTERN = r"^[0-9][0-9_]{0,17}$|^[0-9]{1,6}(\.[0-9]{1,3})?[kKMGB]$"
_RATE_PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}  # in seconds
_TOKEN_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
MOST_TOKENS = 10**15
MAX_HOURLY_PRICE = 10_000.0
_SIZE_UNITS = {"mib": 1.0, "gib": 1024.0, "tib": 1024.0**2, "mb": 1e6 / 2**20, "gb": 1e9 / 2**20, "tb": 1e12 / 2**20}
_SIZE_UNITS |= {unit[0]: _SIZE_UNITS[unit] for unit in ("mib", "gib", "tib")}  # as docker and nvidia-smi read them
SIZE_PATTERN = r"^\d{1,9}(\.\d{1,6})?\s*([mMgGtT]([iI]?[bB])?)$"
DURATION_PATTERN = r"^\d+(\.\d+)?\s*(ms|s|m|h)$"


class SensitiveError(ValueError):
    """The value may contain a secret and must not be shown. The text completes a sentence that begins with "this"."""


def parse_name(text: str) -> str:
    """Returns ``text`` if it can name a mesh, a node or a label."""
    if not re.fullmatch(NAME_PATTERN, text):
        raise ValueError("is not a name: use letters, digits, dots, hyphens and underscores, 63 at most")
    return text


def parse_line(text: str) -> str:
    """Returns ``text`` if it is one line of printable characters, such as the name of a model or a GPU."""
    if not text.strip() or len(text) > 512 or not text.isprintable():
        raise ValueError("must be one line of 1 to 512 characters")
    return text


def parse_integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise ValueError("is not a whole number")
    return int(text)


def parse_boolean(text: str) -> bool:
    """Returns the truth value of ``true``, ``no``, ``on`` or another usual word, in upper or lower case."""
    truth_value = _TRUTH_VALUES.get(text.lower())
    if truth_value is None:
        raise ValueError("is neither true nor false")
    return truth_value


def parse_weight(text: str) -> float:
    """Returns the weight of a node, which is more than 0 and at most 1000."""
    if not re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", text.strip()):
        raise ValueError("is not a number")
    number = float(text)
    if not 0 < number <= 1000:
        raise ValueError("is not more than 0 and at most 1000; `enabled: false` leaves a node alone")
    return number


def parse_hourly_price(text: str) -> float:
    """Returns what a node costs in an hour, from 0 (a machine of one's own) to 10,000."""
    if not re.fullmatch(r"[0-9]{0,5}\.?[0-9]{1,9}", text.strip()):
        raise ValueError("is not a price such as 0.34")
    return check_range(float(text), 0.0, MAX_HOURLY_PRICE, "{:g}".format)


def check_range(number: _N, minimum: _N, maximum: _N, format_number: Callable[[_N], str]) -> _N:
    """Returns ``number`` if it is from ``minimum`` to ``maximum``, both included. ``format_number`` writes these two
    for the message."""
    if not minimum <= number <= maximum:
        if minimum == maximum:  # as for the key ``version``
            raise ValueError(f"is not {format_number(minimum)}, which is all that is known here")
        raise ValueError(f"is not between {format_number(minimum)} and {format_number(maximum)}")
    return number


def parse_duration(text: str) -> float:
    """Returns the seconds of a duration such as ``500ms``."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            raise ValueError(f"has no unit: write {text.strip()}s for seconds, or 500ms, 2m")
        raise ValueError("is not a duration: write 500ms, 5s or 2m")
    return float(match["number"]) * _UNITS[match["unit"]]


def parse_size(text: str) -> int:
    """Returns the MiB of a size such as ``20GiB``, ``20G`` (the same), ``512MiB`` or ``20GB`` (10^9 bytes)."""
    match = re.fullmatch(SIZE_PATTERN, text.strip())
    if match is None:
        if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            raise ValueError(f"has no unit: write {text.strip()}GiB, or 512MiB")
        raise ValueError("is not a size: write 20GiB or 512MiB")
    unit = match[2]
    mib = int(float(text.strip().removesuffix(unit)) * _SIZE_UNITS[unit.lower()])
    return check_range(mib, 1, 1 << 30, format_size)


def format_size(mib: int) -> str:
    """Writes what ``parse_size`` reads: ``20GiB``, ``20000MiB``."""
    return f"{mib // 1024}GiB" if mib and mib % 1024 == 0 else f"{mib}MiB"


def parse_heartbeat(text: str) -> float:
    """Returns the seconds of a duration from 2s to 5m; 0 for ``off``. The end of an answer may follow its last frame by
    a second (``DRAIN_S``), and no heartbeat may come between."""
    if text.strip().lower() in ("off", "false", "no"):
        return 0.0
    return check_range(parse_duration(text), 2.0, 300.0, format_duration)


def format_heartbeat(seconds: float) -> str:
    """Writes what ``parse_heartbeat`` reads."""
    return format_duration(seconds) if seconds else "off"


def format_duration(seconds: float) -> str:
    """Writes the duration as a person would: ``2m``, ``1.5s``, ``500ms``.

    Tries several forms, and returns the first from which ``parse_duration`` reads the same number of seconds. If there
    is none, returns the seconds with six decimals, which is the closest form.
    """
    in_hours, in_minutes, in_seconds, in_milliseconds = (
        f"{seconds / _UNITS[unit]:.0f}{unit}" for unit in ("h", "m", "s", "ms")
    )
    short_fraction, finest_fraction = f"{seconds:.6g}s", f"{seconds * 1000:.6f}ms"
    small_units = [in_milliseconds, short_fraction]
    if seconds > 1:
        small_units.reverse()  # 1.5s rather than 1500ms
    for form in (in_hours, in_minutes, in_seconds, *small_units, finest_fraction):
        is_readable = _DURATION.fullmatch(form) is not None  # 1e-06s is not readable
        if is_readable and parse_duration(form) == seconds:
            return form
    return f"{seconds:.6f}s"


def parse_rate(text: str) -> RequestRate:
    """Returns the rate of a text such as ``60`` (in a minute), ``10/s``, ``60/m``, ``1000/h`` or ``5000/d``."""
    if not re.fullmatch(RATE_PATTERN, text.strip()):
        raise ValueError("is not a rate: write 60 for 60 requests in a minute, or 10/s, 60/m, 1000/h, 5000/d")
    count, _, unit = text.partition("/")
    requests = int(count)
    if requests == 0:
        raise ValueError("allows no request: a key that may not be used is better left out")
    return RequestRate(requests, _RATE_PERIODS[unit.strip() or "m"])


def format_rate(rate: RequestRate) -> str:
    """Writes what ``parse_rate`` reads: ``60/m``."""
    unit = next(unit for unit, period_s in _RATE_PERIODS.items() if period_s == rate.period_s)
    return f"{rate.requests}/{unit}"


def parse_tokens(text: str) -> int:
    """Returns the number of tokens of a text such as ``2000000``, ``2_000_000``, ``500k`` or ``1.5M``."""
    text = text.strip()
    if not re.fullmatch(TOKENS_PATTERN, text):
        raise ValueError("is not a number of tokens: write 2000000, 500k or 2M")
    unit = _TOKEN_UNITS.get(text[-1])
    tokens = int(text.replace("_", "")) if unit is None else round(float(text[:-1]) * unit)
    if not 0 < tokens <= MOST_TOKENS:
        raise ValueError(f"is not between 1 and {MOST_TOKENS}")
    return tokens


def parse_host(text: str) -> str:
    """Returns the host name or address. Brackets around an IPv6 address are removed; a zone (``%eth0``) stays."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" in bare:  # an IPv6 address, or a mistake
        address, _, zone = bare.partition("%")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            name, _, port = bare.rpartition(":")
            is_name_and_port = ":" not in name and port.isascii() and port.isdigit()
            if is_name_and_port:
                raise ValueError(f"holds a port as well: write `port: {port}` apart") from None
            raise ValueError("is neither a host name nor an address") from None
        if zone and not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", zone):
            raise ValueError("has a zone that no interface is named by")
        return bare
    if "@" in bare:
        raise ValueError("holds a user as well: write `user:` apart")
    if not _HOST.fullmatch(bare):
        raise ValueError("is neither a host name nor an address")
    return bare


def parse_user(text: str) -> str:
    """Returns ``text`` if it is a user's name by the rule of OpenSSH's ``valid_ruser``.

    A name with a leading hyphen could be taken for an option. The shell that runs a ``ProxyCommand`` with the name
    would interpret quotes and brackets.
    """
    if not _USER.fullmatch(text) or _SHELL_CHARACTERS.search(text):
        raise ValueError("is not a user's name")
    return text


def parse_jump(text: str) -> str:
    """Returns ``text`` if it is ``[user@]host[:port]``, one jump host as ``ssh -J`` accepts it."""
    user, at, address = text.strip().rpartition("@")
    if at:
        parse_user(user)
    match = re.fullmatch(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>\d{1,5}))?", address)
    if match is None:
        raise ValueError("is not [user@]host[:port]")
    parse_host(match["host"])
    if match["port"] is not None and not 1 <= int(match["port"]) <= 65535:
        raise ValueError("has a port that is not between 1 and 65535")
    return text.strip()


def split_jumps(text: str) -> tuple[str, ...]:
    """Splits a chain of jump hosts, as ``ssh -J`` has it (``a,b``), at its commas."""
    return tuple(text.split(","))


def parse_alias(text: str) -> str:
    """Returns ``text`` if it can be a ``Host`` of ``~/.ssh/config``. The alias becomes an argument of ssh, so it must
    not look like an option."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:@+-]{0,252}", text):
        raise ValueError("is not the name of a Host in ~/.ssh/config")
    return text


def parse_variable_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", text):
        raise SensitiveError("must be the name of an environment variable, not the secret itself")
    return text


def parse_sha256(text: str) -> str:
    """Returns a SHA-256 in hexadecimal, in lower case. A text of another form may be the key itself."""
    if not re.fullmatch(SHA256_PATTERN, text):
        raise SensitiveError("must be the SHA-256 of the key, 64 hexadecimal digits, not the key itself")
    if text.lower() in _HASHES_OF_NOTHING:
        raise ValueError("is the hash of an empty text: the variable with the key was not set")
    return text.lower()


def parse_path(text: str) -> str:
    """Returns ``text`` if it can be the path of a file; ``~`` stands for our own user's home only."""
    if not text or "\x00" in text or "\n" in text:
        raise ValueError("is not a path")
    if text.startswith("~") and not text.startswith("~/") and text != "~":
        raise ValueError("names another user's home: write the whole path")
    return text


def parse_host_folder(text: str) -> str:
    """Returns ``text`` if it can be the path of a folder on a host, from its root or from the home folder there."""
    parse_path(text)
    if not text.startswith(("/", "~/")):
        raise ValueError("is no whole path: write it from / or from ~/, as it is on the host")
    return text


def parse_pool_model(text: str) -> str:
    """Returns ``text`` if it can be the name of a model of Ollama, or the path of a GGUF file on a host."""
    parse_line(text)
    return parse_host_folder(text) if is_model_path(text) else text


def parse_command(text: str) -> tuple[str, ...]:
    """Splits a command into its program and arguments as a POSIX shell would. No shell runs the command."""
    try:
        arguments = tuple(shlex.split(text))
    except ValueError:
        raise ValueError("has a quote that is not closed") from None
    return check_argv(arguments)


def check_argv(arguments: Sequence[str]) -> tuple[str, ...]:
    """Returns a command's arguments as a tuple, if the first of them names a program."""
    if not arguments or not arguments[0]:
        raise ValueError("names no program")
    return tuple(arguments)


def parse_webhook(text: str) -> str:
    """Returns the URL of a webhook, which may have a query. Its errors do not repeat it: it can be a secret."""
    try:
        parts = urlsplit(text)
        has_host = bool(parts.hostname)
        _ = parts.port  # raises ValueError
    except ValueError:
        raise SensitiveError("is not a URL: the port or the address in it cannot be read") from None
    if parts.scheme not in _SCHEME_PORTS or not has_host or not text.isascii() or not text.isprintable():
        raise SensitiveError("is not a URL: write it like https://example.org/hook")
    if parts.username is not None or parts.password is not None:
        raise SensitiveError("holds a user or password: name the variable that holds the URL in webhook_env")
    return text


def parse_url(text: str) -> Target:
    """Returns the server's address in ``http://host[:port][/path]``, or in the same with https. Without a port, the
    port is 80 or 443.

    A trailing ``/v1`` is removed: gpumesh adds the path of the API itself.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("is not a URL: the port or the address in it cannot be read") from None
    if parts.scheme not in _SCHEME_PORTS or not parts.netloc:
        raise ValueError("is not a URL: write it like http://127.0.0.1:11434")
    if parts.username is not None or parts.password is not None:
        raise SensitiveError("holds a user or password: name the key's variable in api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("has a query or fragment, which a base URL does not")
    if port == 0:
        raise ValueError("has port 0: a server listens on 1 to 65535")
    base_path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    if not _PATH.fullmatch(base_path):
        raise ValueError("has a path with characters that must be percent-encoded")
    host = parse_host(parts.hostname or "")
    return Target(host, port or _SCHEME_PORTS[parts.scheme], parts.scheme, base_path)


def parse_origin(text: str) -> str:
    """Returns ``text`` if it is an Origin as browsers send it (``https://app.example.com:8443``), or ``*``, which
    stands for every page."""
    if text == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+", text):
        return text
    raise ValueError("is not an origin: write it like https://app.example.com, without a path")
