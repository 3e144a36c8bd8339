"""Signs of life of a host, and the round trip to it, on a paramiko transport. Blocking: see blocking.py.

A question that the network loses is sent again by TCP only after a pause that doubles each time; with 5 % of packets
lost, three in a row are lost every few thousand questions, and the answer then comes after the host was given up. A
packet that *follows* a lost one makes TCP see the loss a round trip later. So the question is asked again while no
answer has come; in either direction the next one then mends the one before.

paramiko's own ``global_request`` takes any answer for that of the last request. Answers come in the order of the
questions (RFC 4254, section 4), so here each finds its own.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, cast

import paramiko
from paramiko.common import MSG_REQUEST_FAILURE, MSG_REQUEST_SUCCESS, cMSG_GLOBAL_REQUEST

from gpumesh.tunnels.blocking import ThreadEvent

RESEND_S = 0.5
LOOK_S = 0.1  # how often it is looked whether the transport has ended


class Heartbeat:
    """The only one to send global requests on this transport from now on."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = cast(Any, transport)  # what is used is not in its types
        self._unanswered: deque[ThreadEvent] = deque()
        for kind in (MSG_REQUEST_SUCCESS, MSG_REQUEST_FAILURE):
            self._transport._handler_table[kind] = self._answered

    def measure_round_trip_ms(self) -> float | None:
        """Waits for the host's answer to a request that every SSH server answers, if only by refusing it. ``None``:
        the transport has ended. Raises what paramiko raises when it cannot be sent."""
        began = time.monotonic()
        answered = self._ask()
        again_at = began + RESEND_S
        while not answered.wait(LOOK_S):
            if not self._transport.active:
                return None
            if time.monotonic() >= again_at:
                self._ask()
                again_at += RESEND_S
        return (time.monotonic() - began) * 1000

    def _ask(self) -> ThreadEvent:
        answered = ThreadEvent()
        message = paramiko.Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self._unanswered.append(answered)
        self._transport._send_user_message(message)
        return answered

    def _answered(self, _: paramiko.Message) -> None:
        """In the transport's thread."""
        if self._unanswered:
            self._unanswered.popleft().set()
