"""Pings a host over a paramiko transport, and measures the round trip in ms. Blocking: see blocking.py.

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

POLL_S = 0.1  # time between two checks whether the transport has ended


class Heartbeat:
    """Sends the pings of a transport. No other code may send a global request on this transport."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = cast(Any, transport)  # paramiko's types lack the private parts that are used here
        self._unanswered: deque[ThreadEvent] = deque()  # the events of the open requests, the oldest first
        for message_type in (MSG_REQUEST_SUCCESS, MSG_REQUEST_FAILURE):
            self._transport._handler_table[message_type] = self._on_answer

    def measure_round_trip_ms(self) -> float | None:
        """Pings the host, and returns the time until its answer in ms; ``None``: the transport has ended.

        The ping is a request that every SSH server answers, if only by a refusal. The time ends with the answer to the
        first request, also if the request was sent again. Raises what paramiko raises when a request cannot be sent.
        """
        sent_at = time.monotonic()
        answered = self._send_request()
        resend_at = sent_at + PING_RESEND_S
        while not answered.wait(POLL_S):
            if not self._transport.active:
                return None
            if time.monotonic() >= resend_at:
                self._send_request()  # its answer comes after the answer that we wait for
                resend_at += PING_RESEND_S
        return (time.monotonic() - sent_at) * 1000

    def _send_request(self) -> ThreadEvent:
        """Sends one request, and returns the event that its answer sets."""
        answered = ThreadEvent()
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)  # "want reply": without it the host does not answer
        self._unanswered.append(answered)
        self._transport._send_user_message(message)
        return answered

    def _on_answer(self, _: paramiko.Message) -> None:
        """Assigns an answer to the oldest open request. paramiko calls this in the transport's thread."""
        if self._unanswered:
            self._unanswered.popleft().set()
