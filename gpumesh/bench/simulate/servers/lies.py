"""The false reports of a simulated server: its durations, its counts of tokens, and its list of models."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from random import Random

from gpumesh.backends.base import ServerCounters
from gpumesh.bench.simulate.fleet import Fault, FaultKind, NodeSpec
from gpumesh.bench.simulate.requests import Attempt


class ServerLies:
    """The false reports of one server. The faults of its ``spec`` that begin at once are active from the start.

    ``listed`` are the models that it lists, by full name; it is the same object until the list changes. ``missing`` are
    the models for which it answers 404 although it should have them."""

    def __init__(self, spec: NodeSpec) -> None:
        self._models = frozenset(spec.models)
        self._rng = Random(spec.name)
        self._duration_factor = 1.0  # multiplies all reported durations
        self._eval_factor = 1.0  # multiplies the reported time of generation; the reported total stays true
        self._gives_counts = True  # whether its answers have counters
        self._count_factor = 1.0  # multiplies all reported counts of tokens
        self._max_random_factor = 1.0  # each count is multiplied by a random factor from 1 / this to this
        self._unlisted: AbstractSet[str] = frozenset()  # models that the server has, but does not list
        self.missing: AbstractSet[str] = frozenset()
        self.listed: AbstractSet[str] = self._models
        for fault in spec.faults:
            if fault.starts_at <= 0.0:
                self.change(fault, starts=True)

    def __repr__(self) -> str:
        return f"<ServerLies lists {len(self.listed)} models, {len(self.missing)} of them missing>"

    def has_model(self, model: str) -> bool:
        """Whether the server can serve the model, whatever its list says."""
        return model in self._models and model not in self.missing

    def change(self, fault: Fault, *, starts: bool) -> None:
        """Starts or ends a fault. A fault of a kind that is no false report changes nothing."""
        factor = fault.factor if starts else 1.0
        concerned = self._models if fault.model is None else frozenset((fault.model,))
        if fault.kind is FaultKind.LYING:
            self._duration_factor = factor
        elif fault.kind is FaultKind.SHIFTING:
            self._eval_factor = factor
        elif fault.kind is FaultKind.MISCOUNTING:
            self._count_factor = factor
        elif fault.kind is FaultKind.RANDOM_COUNTS:
            self._max_random_factor = factor
        elif fault.kind is FaultKind.NO_COUNTS:
            self._gives_counts = not starts
        elif fault.kind is FaultKind.LISTS_MISSING:
            self.missing = self.missing | concerned if starts else self.missing - concerned
        elif fault.kind is FaultKind.HIDES:
            self._unlisted = self._unlisted | concerned if starts else self._unlisted - concerned
        listed = (self._models | self.missing) - self._unlisted
        if listed != self.listed:
            self.listed = listed

    def final_counters(self, attempt: Attempt, now: float) -> ServerCounters:
        """The counters in the final frame of the answer, with the lies. Durations are in ms."""
        reported_ms_per_s = 1000.0 * self._duration_factor
        eval_s = now - attempt.first_token_at
        # A part of the time of generation that the server reports as time of reading (negative: the reverse). So the
        # reported total stays true.
        shifted_s = eval_s * (1.0 - self._eval_factor)
        reported_prompt_s = max(attempt.first_token_at - attempt.slot_at + shifted_s, 0.0)
        return ServerCounters(
            prompt_tokens=self._count(attempt.job.prompt_tokens),
            tokens=self._count(attempt.job.tokens_left),
            total_ms=(now - attempt.arrived_at) * reported_ms_per_s,
            load_ms=(attempt.ready_at - attempt.arrived_at) * reported_ms_per_s,
            prompt_ms=reported_prompt_s * reported_ms_per_s,
            eval_ms=(eval_s - shifted_s) * reported_ms_per_s,
        )

    def _count(self, tokens: int) -> int | None:
        """The count of tokens that the server reports for this true count; ``None`` if it reports none."""
        if not self._gives_counts:
            return None
        factor = self._count_factor
        if self._max_random_factor != 1.0:
            factor *= self._max_random_factor ** self._rng.uniform(-1.0, 1.0)
        return int(tokens * factor)
