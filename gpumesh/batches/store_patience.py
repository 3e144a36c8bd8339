"""``StorePatience`` does work with a store again and again while the store cannot be used, and reports that once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gpumesh.errors import BatchStoreError

log = logging.getLogger(__name__)

T = TypeVar("T")


class StorePatience:
    """``on_problem`` gets the error while the store cannot be used, and ``None`` when it can be used again.
    ``pause_s``: after the first failure; each later pause is twice as long, up to ``longest_pause_s``."""

    def __init__(
        self, on_problem: Callable[[BatchStoreError | None], None], pause_s: float, longest_pause_s: float
    ) -> None:
        self.problem: BatchStoreError | None = None
        self._on_problem = on_problem
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._failing_count = 0  # calls of ``use_store`` that try again

    async def use_store(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does ``work`` until the store can be used, and returns its result. Raises its other errors."""
        pause_s = self._pause_s
        is_failing = False
        try:
            while True:
                try:
                    result = await work()
                except BatchStoreError as error:
                    if not is_failing:
                        is_failing = True
                        self._failing_count += 1
                    self._note_problem(error)
                else:
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2.0, self._longest_pause_s)
        finally:
            if is_failing:
                self._failing_count -= 1
        if not self._failing_count:
            self._note_success()
        return result

    def _note_problem(self, error: BatchStoreError) -> None:
        """Reports that the store cannot be used, unless that is reported already."""
        if self.problem is None:
            log.warning("batches wait: %s", error, extra={"event": "batch"})
            self.problem = error
            self._on_problem(error)

    def _note_success(self) -> None:
        """Reports that the store can be used again. Called when no work is left that the store has refused: a store
        whose disk is full can still be read."""
        if self.problem is not None:
            log.info("batches go on", extra={"event": "batch"})
            self.problem = None
            self._on_problem(None)
