"""Runs an asyncio program so that it can clean up after Ctrl-C, SIGTERM and SIGHUP; with uvloop for a mesh."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from gpumesh.event_loop.fast_loop import fast_loop_factory

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, use_uvloop: bool = True) -> T:
    """Runs ``main`` like ``asyncio.run``, and returns its result. A signal cancels ``main``, which can then clean up.

    After SIGINT this raises KeyboardInterrupt. After SIGTERM or SIGHUP, unless the signal is ignored, the process exits
    with 128 plus the signal's number.

    ``use_uvloop`` is for a process that runs a mesh: only there is uvloop worth the time of its import. Such a process
    also holds the bodies of many requests, so its memory is set up for them (``large_memory.py``).

    If SIGINT comes while the loop is being made, it is delivered only when ``main`` has begun: an unfinished loop
    cannot be closed.
    """
    if use_uvloop:
        from gpumesh.daemon.process.large_memory import map_large_blocks

        map_large_blocks()
    loop_factory = fast_loop_factory() if use_uvloop else None
    received_signals: list[int] = []
    with ExitStack() as stack:
        unblock = stack.enter_context(_sigint_blocked())
        with _sigint_held():
            runner = stack.enter_context(asyncio.Runner(loop_factory=loop_factory))  # this makes the loop

        async def run_main() -> T:
            _cancel_on_signals(received_signals)
            unblock()
            return await main

        try:
            return runner.run(run_main())
        except asyncio.CancelledError:
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


@contextmanager
def _sigint_blocked() -> Iterator[Callable[[], None]]:
    """Blocks SIGINT until the block ends, or until the function that this yields is called. Does nothing on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield lambda: None
        return
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    try:
        yield unblock
    finally:
        unblock()


@contextmanager
def _sigint_held() -> Iterator[None]:
    """Holds SIGINT back until the block ends, also one that comes to another thread.

    ``_sigint_blocked`` is not enough for that: if the process has other threads, as while a progress bar is shown, one
    of them takes the signal, and Python raises KeyboardInterrupt in the main thread all the same.
    """
    received_numbers: list[int] = []
    try:
        previous_handler = signal.signal(signal.SIGINT, lambda number, _frame: received_numbers.append(number))
    except ValueError:  # this is not the main thread, which alone gets KeyboardInterrupt
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
        if received_numbers:
            signal.raise_signal(signal.SIGINT)
