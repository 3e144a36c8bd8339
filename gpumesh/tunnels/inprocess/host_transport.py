"""paramiko's transport, which also keeps what the host says (its banners, and why it hangs up), and asks it about a key
before the key signs.

paramiko writes the texts to its log only. This uses private parts of paramiko: its tables of packet handlers. Without
the transport's table the texts are missing, and nothing else.
"""

from __future__ import annotations

from typing import Any, cast

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.common import MSG_USERAUTH_BANNER, MSG_USERAUTH_INFO_REQUEST, cMSG_USERAUTH_REQUEST

from gpumesh.tunnels import blocking

MSG_USERAUTH_PK_OK = MSG_USERAUTH_INFO_REQUEST  # the meaning of number 60 depends on the method (RFC 4252, section 6)

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

    def asks_for_signature(self, user: str, key: paramiko.PKey) -> bool:
        """Asks the host whether it would take this key, as ssh does (RFC 4252, section 7). Blocks.

        For keys of an agent: each signature may need a touch of a token, or a click of a person. If the host refuses
        the key, raises as ``auth_publickey``.
        """
        handler = _KeyQuestion(self)
        self.auth_handler = handler
        answered = blocking.ThreadEvent()
        handler.auth_publickey(user, key, answered)
        try:
            handler.wait_for_response(answered)
        except paramiko.AuthenticationException:
            if not handler.is_acceptable:
                raise
        return handler.is_acceptable

    def _parse_banner(self, message: paramiko.Message) -> None:
        self._add_words(message.get_string())

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        message.get_int()  # the reason's number, which the text repeats
        self._add_words(message.get_string())

    def _add_words(self, text: bytes) -> None:
        if self._banner_count < _MAX_BANNERS:
            self._banner_count += 1
            self.words += text[:_MAX_TEXT_BYTES].splitlines()


class _KeyQuestion(AuthHandler):
    """One attempt of paramiko's, whose request for a login with a key has no signature. ``is_acceptable``: the host
    would take the key."""

    is_acceptable = False

    @property
    def _client_handler_table(self) -> dict[int, Any]:
        table: dict[int, Any] = super()._client_handler_table  # type: ignore[misc]
        return {**table, MSG_USERAUTH_PK_OK: self._parse_acceptable}

    def _parse_service_accept(self, message: paramiko.Message) -> None:
        if message.get_text() != "ssh-userauth":
            return
        handler = cast(Any, self)  # paramiko's types lack the parts that are used here
        key_type, public_key = handler._get_key_type_and_bits(self.private_key)
        request = paramiko.Message()
        request.add_byte(cMSG_USERAUTH_REQUEST)
        request.add_string(handler.username)
        request.add_string("ssh-connection")
        request.add_string(self.auth_method)
        request.add_boolean(False)  # no signature follows
        request.add_string(handler._finalize_pubkey_algorithm(key_type))
        request.add_string(public_key)
        handler.transport._send_message(request)

    def _parse_acceptable(self, _message: paramiko.Message) -> None:
        self.is_acceptable = True
        cast(Any, self).auth_event.set()
