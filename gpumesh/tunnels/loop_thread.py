"""``LoopThread``: a thread with an event loop of its own, for callers that do not run in one (``library/sync.py``).

A notebook has a loop that already runs, and a script has none: neither can wait for a coroutine with ``asyncio.run``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

T = TypeVar("T")

STOP_TIMEOUT_S = 10.0  # for the tasks that are left at the end


class LoopThread:
    """The thread runs from ``start`` until ``stop``. It is a daemon thread, so a program ends without ``stop`` too."""

    def __init__(self, name: str) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_ready = threading.Event()  # set when ``_loop`` runs
        self._closing: asyncio.Event | None = None  # while a context is entered
        self._lifetime: concurrent.futures.Future[None] | None = None  # of the context
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __repr__(self) -> str:
        return f"<LoopThread {self._thread.name} {'RUNNING' if self._thread.is_alive() else 'STOPPED'}>"

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()
        self._is_ready.wait()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine in the thread's loop. Its future can be cancelled, which cancels the coroutine."""
        assert self._loop is not None, "the thread was not started"
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the thread's loop, and returns its result. If the caller is interrupted (Ctrl-C), the
        coroutine is cancelled. Raises RuntimeError if the thread was stopped, and if the caller runs in this thread: it
        would wait for itself."""
        if not self.is_running or threading.current_thread() is self._thread:
            work.close()
            reason = "has ended" if not self.is_running else "cannot wait for itself"
            raise RuntimeError(f"the thread {self._thread.name} {reason}")
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # without effect if the coroutine itself has raised
            raise

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enters a context in the thread's loop, and returns what it gives. One task enters and leaves it, as task
        groups demand. Raises what entering it raises. At most one context at a time."""
        entered: concurrent.futures.Future[T] = concurrent.futures.Future()

        async def hold() -> None:
            """Enters the context, and keeps it open until the thread is closed."""
            self._closing = asyncio.Event()
            try:
                async with context as value:
                    entered.set_result(value)
                    await self._closing.wait()
            except BaseException as error:
                if entered.done():  # the error comes from leaving the context
                    raise
                entered.set_exception(error)

        self._lifetime = self.submit(hold())
        try:
            return entered.result()
        except BaseException:
            self._lifetime.cancel()  # Ctrl-C came while the context was entered
            raise

    def leave(self) -> None:
        """Leaves the context. Raises what leaving it raises."""
        assert self._loop is not None, "the thread was not started"
        assert self._closing is not None, "no context was entered"
        assert self._lifetime is not None, "no context was entered"
        self._loop.call_soon_threadsafe(self._closing.set)
        self._lifetime.result()

    def stop(self) -> None:
        """Cancels what still runs in the loop, and ends the thread."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        with asyncio.Runner() as runner:  # its end cancels all tasks, and closes async generators
            self._loop = runner.get_loop()
            self._loop.call_soon(self._is_ready.set)
            self._loop.run_forever()
