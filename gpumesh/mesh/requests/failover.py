"""``Failover``: what a streaming answer needs of the delivery of its request to be continued by another node."""

from __future__ import annotations

from typing import Protocol

from gpumesh.backends.continuation.continuation import Continuation
from gpumesh.backends.continuation.ending import Ending
from gpumesh.mesh.requests.answer_reading import OpenedStream
from gpumesh.mesh.requests.failures import FailedAttempt


class Failover(Protocol):
    """Finds the node that continues an answer. ``attempts`` counts the requests to nodes, for this answer as a
    whole."""

    @property
    def attempts(self) -> int: ...

    def has_other_node(self, node: str) -> bool:
        """Whether any other node than this one could continue the answer."""

    def slot_is_wanted(self, node: str) -> bool:
        """Whether other requests wait for a slot on this node."""

    async def continue_answer(self, continuation: Continuation, failed: FailedAttempt) -> OpenedStream | Ending:
        """Returns the stream of the node that continues, or the answer's end. Raises GPUMeshError if no node can
        continue. ``failed`` is the failure of the node that was lost."""
