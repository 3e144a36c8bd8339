"""``StreamState``: how far the stream of the node that serves a streaming answer has come."""

from __future__ import annotations

from enum import Enum


class StreamState(Enum):
    """The state of the current node's stream."""

    FLOWING = "flowing"
    DRAINING = "draining"  # the client has the final frame; the body has not ended yet
    LOST = "lost"  # the node has failed, and no other node continues the answer yet
    ENDED = "ended"  # the whole answer has ended
