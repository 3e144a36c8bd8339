"""How busy a simulated GPU is and was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """The load that nvidia-smi shows.

    ``busy`` is the use of the GPU, from 0 to 1. ``heat`` is a slower average of it: the
    temperature and the fan follow it. ``models`` are the models in memory: the name and the memory in MiB of each.
    """

    busy: float = 0.0
    heat: float = 0.0
    models: tuple[tuple[str, int], ...] = ()


class UsageAverage:
    """How busy a GPU was lately, from 0 to 1: an exponential average with the time constant ``tau_s`` (seconds).

    The average moves towards a target: the use of the GPU at this moment.
    """

    def __init__(self, tau_s: float, clock: Callable[[], float]) -> None:
        self._tau_s = tau_s
        self._clock = clock
        self._updated_at = clock()
        self._average = 0.0
        self._target = 0.0

    def set_target(self, target: float) -> None:
        """Sets the use of the GPU from now on, from 0 to 1."""
        self.update()
        self._target = target

    def update(self) -> float:
        """Computes the average at this moment, and returns it."""
        now = self._clock()
        share_of_target = 1.0 - math.exp(-(now - self._updated_at) / self._tau_s)
        self._average += (self._target - self._average) * share_of_target
        self._updated_at = now
        return self._average
