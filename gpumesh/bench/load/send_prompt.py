"""``SendPrompt``, the protocol of every way over which the load generator sends a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from gpumesh.backends.base import ChatRequest, Chunk


class AnswerStream(Protocol):
    """An answer while it arrives, piece by piece. ``node`` and ``attempts`` are right from the first piece on."""

    @property
    def node(self) -> str | None:
        """The name of the node that answers."""
        ...

    @property
    def attempts(self) -> int:
        """The number of attempts, which is more than 1 after a failover."""
        ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...


class SendPrompt(Protocol):
    """Sends a request to ``node`` and yields the answer; for ``None`` the mesh chooses the node. Raises GPUMeshError.

    The end of the context cancels the request if the answer is not complete.
    """

    def __call__(self, request: ChatRequest, node: str | None) -> AbstractAsyncContextManager[AnswerStream]: ...
