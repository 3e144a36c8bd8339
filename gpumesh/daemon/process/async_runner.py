"""Runs an asyncio program so that it can clean up after Ctrl-C, SIGTERM and SIGHUP; with uvloop for a mesh."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, Self, TypeVar

from gpumesh.event_loop.fast_loop import fast_loop_factory

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, use_uvloop: bool = True) -> T:
    """Runs ``main`` like ``asyncio.run``, and returns its result. A signal cancels ``main``, which can then clean up.

    After SIGINT this raises KeyboardInterrupt; a second SIGINT raises it at once. After SIGTERM or SIGHUP, unless the
    signal is ignored, the process exits with 128 plus the signal's number.

    ``use_uvloop`` is for a process that runs a mesh: only there is uvloop worth the time of its import. Such a process
    also holds the bodies of many requests, so its memory is set up for them (``large_memory.py``).
    """
    if use_uvloop:
        from gpumesh.daemon.process.large_memory import map_large_blocks

        map_large_blocks()
    loop_factory = fast_loop_factory() if use_uvloop else None
    received_signals: list[int] = []
    with _Interrupts() as interrupts, asyncio.Runner(loop_factory=loop_factory) as runner:

        async def run_main() -> T:
            _cancel_on_signals(received_signals)
            interrupts.cancel_current_task()
            return await main

        try:
            return runner.run(run_main())
        except asyncio.CancelledError:
            if interrupts.count:
                raise KeyboardInterrupt from None
            if received_signals:
                first_signal = received_signals[0]
                raise SystemExit(128 + first_signal) from None
            raise


def _cancel_on_signals(received_signals: list[int]) -> None:
    """Makes SIGTERM and SIGHUP cancel the current task, and append their number to ``received_signals``.

    The task may replace these handlers later. A signal that is ignored stays ignored.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None, "this was called outside of a task"

    def handle(number: int) -> None:
        received_signals.append(number)
        task.cancel()

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with suppress(NotImplementedError, RuntimeError):  # Windows; not the main thread
                loop.add_signal_handler(number, handle, number)


class _Interrupts:
    """Handles SIGINT in place of Python and of ``asyncio.Runner``, as a context manager: the first one cancels a task,
    a later one raises KeyboardInterrupt. Does nothing if SIGINT is ignored, or outside of the main thread.

    Until ``cancel_current_task`` is called, an interrupt only counts. A KeyboardInterrupt while a loop is being made
    would leave a loop that cannot be closed. And the Runner of Python 3.11 forgets an interrupt that comes between the
    setting of its handler and its next line; main then ends with a CancelledError that nobody explains.
    """

    def __init__(self) -> None:
        self.count = 0
        self._task: asyncio.Task[Any] | None = None
        self._is_installed = False

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with suppress(ValueError):  # this is not the main thread, which alone gets KeyboardInterrupt
                signal.signal(signal.SIGINT, self._handle)
                self._is_installed = True
        return self

    def __exit__(self, *_: object) -> None:
        # The task may have set a handler of its own.
        if self._is_installed and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def cancel_current_task(self) -> None:
        """From now on an interrupt cancels the current task; at once if there was one already."""
        self._task = asyncio.current_task()
        if self.count and self._task is not None:
            self._task.cancel()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self._task is None:
            return
        if self.count > 1 or self._task.done():
            raise KeyboardInterrupt
        self._task.cancel()
        self._task.get_loop().call_soon_threadsafe(lambda: None)  # wakes the loop
