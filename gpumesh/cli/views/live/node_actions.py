"""Drains, resumes or reconnects a node when a key of the live table asks for it, and reports the result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from gpumesh.cli.views.safe_text import clean_line
from gpumesh.daemon.sessions.session import Session
from gpumesh.errors import GPUMeshError


class NodeActions:
    """Runs each action as a task, so that the table is redrawn meanwhile. At the end of each action calls ``report``
    with one line of text."""

    def __init__(self, session: Session, report: Callable[[str], None]) -> None:
        # By action: the function that carries it out on a node.
        self._calls: dict[str, Callable[[str], Coroutine[Any, Any, None]]] = {
            "drain": session.drain,
            "resume": session.resume,
            "reconnect": session.reconnect,
        }
        self._report = report
        self._running: set[asyncio.Task[None]] = set()

    def start(self, action: str, node: str) -> None:
        """Starts ``drain``, ``resume`` or ``reconnect`` of a node, and returns at once."""
        task = asyncio.create_task(self._perform(action, node), name=action)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _perform(self, action: str, node: str) -> None:
        """Carries out the action, and reports its end or its error."""
        try:
            await self._calls[action](node)
        except GPUMeshError as error:
            self._report(clean_line(f"{action} {node}: {error.message}"))
        else:
            self._report(f"{action} {node}")

    async def close(self) -> None:
        """Cancels the actions that still run."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
