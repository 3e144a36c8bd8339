"""paramiko's transport, which logs in as ssh does (one request for the service, and a question before a key signs), and
keeps what the host says: its banners, and why it hangs up.

paramiko writes the texts to its log only. This uses private parts of paramiko: its tables of packet handlers. Without
the transport's table the texts are missing, and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, cast

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.common import MSG_USERAUTH_BANNER, MSG_USERAUTH_INFO_REQUEST, cMSG_USERAUTH_REQUEST

from gpumesh.tunnels import blocking

MSG_USERAUTH_PK_OK = MSG_USERAUTH_INFO_REQUEST  # the meaning of number 60 depends on the method (RFC 4252, section 6)

_MAX_TEXT_BYTES = 8192  # of one banner
_MAX_BANNERS = 20
_MAX_DEBUG_LINES = 20  # the last ones are kept


class HostTransport(paramiko.Transport):
    """A transport that keeps what the host sends for people to read.

    ``host_lines``: the lines of these texts, of at most ``_MAX_BANNERS`` texts, not made printable yet. They are
    written by the transport's thread. ``debug_lines``: the last texts that the host has sent for a log; a text on why
    it refuses a request comes before the refusal.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.host_lines: list[bytes] = []
        self.service_accepted = False  # the host has accepted the service ssh-userauth
        self.debug_lines: deque[bytes] = deque(maxlen=_MAX_DEBUG_LINES)
        self._banner_count = 0  # those that were kept
        super().__init__(*arguments, **options)
        handlers = getattr(self, "_handler_table", None)
        if isinstance(handlers, dict):
            # paramiko's own handler keeps a banner only until the attempt to log in ends.
            handlers[MSG_USERAUTH_BANNER] = self._parse_banner

    def forget_host_lines(self) -> None:
        """Called after the login: the text of the login does not explain why the connection ends later."""
        self.host_lines.clear()

    # -- attempts to log in, each with one handler of ours -------------------------------------------------------------

    def auth_none(self, username: str) -> list[str]:
        """As paramiko's, and so are the methods below."""
        return self._run_attempt(_LoginAttempt(self), lambda attempt, end: attempt.auth_none(username, end))

    def auth_publickey(self, username: str, key: paramiko.PKey, event: Any = None) -> list[str]:  # noqa: ARG002
        """See paramiko. Also raises SSHException when the key's agent does not sign; the connection stays."""
        return self._run_attempt(_LoginAttempt(self), lambda attempt, end: attempt.auth_publickey(username, key, end))

    def auth_password(
        self,
        username: str,
        password: str,
        event: Any = None,  # noqa: ARG002 - as paramiko's
        fallback: bool = True,  # noqa: ARG002 - as paramiko's; keyboard-interactive is an attempt of its own
    ) -> list[str]:
        return self._run_attempt(
            _LoginAttempt(self), lambda attempt, end: attempt.auth_password(username, password, end)
        )

    def auth_interactive(self, username: str, handler: Any, submethods: str = "") -> list[str]:
        return self._run_attempt(
            _LoginAttempt(self), lambda attempt, end: attempt.auth_interactive(username, handler, end, submethods)
        )

    def ensure_key_is_acceptable(self, username: str, key: paramiko.PKey) -> None:
        """Asks the host whether it would take this key, as ssh does (RFC 4252, section 7). Blocks.

        For keys of an agent: each signature may need a touch of a token, or a click of a person. If the host refuses
        the key, raises as ``auth_publickey``.
        """
        question = _KeyQuestion(self)
        try:
            self._run_attempt(question, lambda attempt, end: attempt.auth_publickey(username, key, end))
        except paramiko.AuthenticationException:
            if not question.is_acceptable:
                raise

    def _run_attempt(self, attempt: _LoginAttempt, start: Callable[[Any, blocking.ThreadEvent], None]) -> list[str]:
        """Runs one attempt. ``start`` sends its first request. Returns the methods that may come next, if more are
        needed. Raises as paramiko's own methods."""
        if not self.is_active() or not self.initial_kex_done:
            raise paramiko.SSHException("No existing session")
        end = blocking.ThreadEvent()
        self.auth_handler = attempt
        start(attempt, end)
        methods: list[str] = attempt.wait_for_response(end)
        return methods

    def _parse_banner(self, message: paramiko.Message) -> None:
        self._add_host_text(message.get_string())

    def _parse_debug(self, message: paramiko.Message) -> None:
        message.get_boolean()  # whether the text is to be shown
        self.debug_lines.append(message.get_string()[:_MAX_TEXT_BYTES])

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        message.get_int()  # the reason's number, which the text repeats
        self._add_host_text(message.get_string())

    def _add_host_text(self, text: bytes) -> None:
        if self._banner_count < _MAX_BANNERS:
            self._banner_count += 1
            self.host_lines += text[:_MAX_TEXT_BYTES].splitlines()


class _LoginAttempt(AuthHandler):
    """One attempt to log in. paramiko would ask for the service ssh-userauth before each attempt; ssh asks once.

    After the first attempt, a key signs in the caller's thread: an error of its agent then ends no connection.
    """

    transport: Any

    def _request_auth(self) -> None:
        if self.transport.service_accepted:
            self._send_request()
        else:
            super()._request_auth()  # type: ignore[misc]

    def _parse_service_accept(self, message: paramiko.Message) -> None:
        self.transport.service_accepted = True
        super()._parse_service_accept(message)  # type: ignore[misc]

    def _send_request(self) -> None:
        """Sends the request of this attempt, which paramiko does when the host has accepted the service."""
        accepted = paramiko.Message()
        accepted.add_string("ssh-userauth")
        accepted.rewind()
        super()._parse_service_accept(accepted)  # type: ignore[misc]


class _KeyQuestion(_LoginAttempt):
    """An attempt to log in with a key that is sent without a signature. ``is_acceptable``: the host would take it."""

    is_acceptable = False

    @property
    def _client_handler_table(self) -> dict[int, Any]:
        table: dict[int, Any] = super()._client_handler_table  # type: ignore[misc]
        return {**table, MSG_USERAUTH_PK_OK: self._parse_acceptable}

    def _send_request(self) -> None:
        """Asks the host whether it would accept this key, without a signature."""
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
        self.transport._send_message(request)

    def _parse_acceptable(self, _message: paramiko.Message) -> None:
        self.is_acceptable = True
        cast(Any, self).auth_event.set()
