"""Quotes the text of a host in our errors: a banner, a refusal, a reason to hang up. Pure.

Such a text often says what to do: visit this address, your account is locked, not at this time. A host can send any
text, so we do not search it for causes that we know. Only the greeting, which comes before the login, is searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from gpumesh.errors import AuthRefused, ConnectRefused, NotSsh, TunnelError
from gpumesh.text.printable import printable

MAX_QUOTED_CHARS = 300
_MAX_LINES = 200  # of one text; later lines are left out
_DECORATION = "*#=-_~+|/\\ \t"  # frames around banners
_SHOWN_ESCAPES = re.compile(r"\\033\[[0-9;?]*[A-Za-z]")  # a terminal escape of a host, as ssh shows it

E = TypeVar("E", bound=TunnelError)


def quote_host_text(lines: Iterable[str | bytes]) -> str:
    """The lines of a host as one short text that is safe to print; "" if they hold no text.

    If the text is too long, the lines with a web address come first, because a person needs the address.
    """
    texts = []
    for line in list(lines)[:_MAX_LINES]:
        text = _SHOWN_ESCAPES.sub("", printable(line)).strip(_DECORATION)
        if text and text not in texts:  # the same banner may come with each attempt
            texts.append(text)
    whole_text = " ".join(texts)
    if len(whole_text) > MAX_QUOTED_CHARS:
        texts.sort(key=lambda text: "://" not in text)  # the sort is stable: other lines keep their order
        whole_text = " ".join(texts)
    return printable(whole_text, MAX_QUOTED_CHARS)


def add_host_text(error: E, lines: Iterable[str | bytes], *, speaker: str = "it") -> E:
    """A copy of the error whose message ends with these lines, as the text of ``speaker``. Returns ``error`` itself if
    the lines hold no text, or if its message has the text already."""
    text = quote_host_text(lines)
    if not text or text in error.message:
        return error
    return type(error)(f"{error.message}; {speaker} says: {text}", hint=error.hint, node=error.node)


def make_pending_login_error(address: str, user: str, timeout_s: float, lines: Iterable[str | bytes]) -> AuthRefused:
    """The error for a host that has neither accepted nor refused a login. ``lines`` of the host say why: the host waits
    for an act of a person, such as a visit to a web page."""
    return AuthRefused(
        f"{address} has not accepted the login of {user} within {timeout_s:g} s; it says: {quote_host_text(lines)}",
        hint="do what it asks for; the login is tried again every minute, or at once by `gpumesh reconnect NODE`",
    )


def error_from_greeting(greeting: str | bytes, address: str) -> TunnelError:
    """The error for a server that sent ``greeting`` instead of an SSH version, and hung up."""
    text = _SHOWN_ESCAPES.sub("", printable(greeting, 80))
    if "MaxStartups" in text:
        return ConnectRefused(f"{address} has too many logins under way (MaxStartups)", hint="it is tried again")
    if "Not allowed at this time" in text:  # OpenSSH's sshd from 9.8 on
        return ConnectRefused(
            f"{address} refuses us for a while after logins that failed; it says: {text}",
            hint="it is tried again; meanwhile find out why logins from here fail (sshd's PerSourcePenalties)",
        )
    return NotSsh(
        f"{address} does not speak SSH; it said {text!r}",
        hint="check `ssh.port`: this looks like another service, or a host that is not ready",
    )
