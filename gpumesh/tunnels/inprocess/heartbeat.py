"""Sends global requests over a paramiko transport: pings, which measure the round trip in ms, and reverse forwards.
Blocking: see blocking.py.

paramiko's own ``global_request`` takes any answer for the answer to the last request. Answers come in the order of the
requests (RFC 4254, section 4), so this file assigns each answer to the oldest open request. A request without an
answer is sent again: ``transport.PING_RESEND_S`` has the reason.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, cast

import paramiko
from paramiko.common import MSG_REQUEST_FAILURE, MSG_REQUEST_SUCCESS, cMSG_GLOBAL_REQUEST

from gpumesh.tunnels.blocking import ThreadEvent
from gpumesh.tunnels.transport import PING_RESEND_S

PING = "keepalive@openssh.com"
POLL_S = 0.1  # time between two checks whether the transport has ended


class _Request:
    """An open request. ``answered`` is set when its answer comes; ``is_granted`` says whether the host agreed."""

    def __init__(self) -> None:
        self.answered = ThreadEvent()
        self.is_granted = False


class Heartbeat:
    """Sends the global requests of a transport. No other code may send one on this transport."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = cast(Any, transport)  # paramiko's types lack the private parts that are used here
        self._unanswered: deque[_Request] = deque()  # the open requests, the oldest first
        handlers = self._transport._handler_table
        handlers[MSG_REQUEST_SUCCESS] = lambda _: self._on_answer(is_granted=True)
        handlers[MSG_REQUEST_FAILURE] = lambda _: self._on_answer(is_granted=False)

    def measure_round_trip_ms(self) -> float | None:
        """Pings the host, and returns the time until its answer in ms; ``None``: the transport has ended.

        The ping is a request that every SSH server answers, if only by a refusal. The time ends with the answer to the
        first request, also if the request was sent again. Raises what paramiko raises when a request cannot be sent.
        """
        sent_at = time.monotonic()
        request = self._send_request(PING)
        resend_at = sent_at + PING_RESEND_S
        while not request.answered.wait(POLL_S):
            if not self._transport.active:
                return None
            if time.monotonic() >= resend_at:
                self._send_request(PING)  # its answer comes after the answer that we wait for
                resend_at += PING_RESEND_S
        return (time.monotonic() - sent_at) * 1000

    def request(self, kind: str, address: str, port: int) -> bool:
        """Sends a request about ``address`` and ``port`` (RFC 4254, section 7.1), and returns whether the host agrees.
        False also when the transport has ended. Raises what paramiko raises when a request cannot be sent."""
        request = self._send_request(kind, address, port)
        while not request.answered.wait(POLL_S):
            if not self._transport.active:
                return False
        return request.is_granted

    def _send_request(self, kind: str, *fields: str | int) -> _Request:
        """Sends one request, and returns it."""
        request = _Request()
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string(kind)
        message.add_boolean(True)  # "want reply": without it the host does not answer
        for value in fields:
            if isinstance(value, int):
                message.add_int(value)
            else:
                message.add_string(value)
        self._unanswered.append(request)
        self._transport._send_user_message(message)
        return request

    def _on_answer(self, *, is_granted: bool) -> None:
        """Assigns an answer to the oldest open request. paramiko calls this in the transport's thread."""
        if self._unanswered:
            request = self._unanswered.popleft()
            request.is_granted = is_granted
            request.answered.set()
