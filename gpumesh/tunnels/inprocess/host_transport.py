"""paramiko's transport, which also keeps what the host says: its banners, and why it hangs up.

paramiko writes these texts to its log only. This uses a private part of paramiko, its table of packet handlers. Without
that part the texts are missing, and nothing else.
"""

from __future__ import annotations

from typing import Any

import paramiko
from paramiko.common import MSG_USERAUTH_BANNER

_MAX_TEXT_BYTES = 8192  # of one banner
_MAX_BANNERS = 20


class HostTransport(paramiko.Transport):
    """``words``: the lines that the host has sent to be shown, at most ``_MAX_BANNERS`` texts, not made printable yet.
    Written by the transport's thread."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.words: list[bytes] = []
        self._banner_count = 0
        super().__init__(*arguments, **options)
        handlers = getattr(self, "_handler_table", None)
        if isinstance(handlers, dict):
            # paramiko's own handler of a banner belongs to one attempt to log in, and forgets the banner with it.
            handlers[MSG_USERAUTH_BANNER] = self._parse_banner

    def forget_words(self) -> None:
        """Called after the login: what was said before explains no later end."""
        self.words.clear()

    def _parse_banner(self, message: paramiko.Message) -> None:
        self._add_words(message.get_string())

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        message.get_int()  # the reason's number, which the text repeats
        self._add_words(message.get_string())

    def _add_words(self, text: bytes) -> None:
        if self._banner_count < _MAX_BANNERS:
            self._banner_count += 1
            self.words += text[:_MAX_TEXT_BYTES].splitlines()
