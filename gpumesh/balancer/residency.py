"""``Residency``: which models one server has in its memory, and what a further load would push out. Pure.

A server reloads a model when a request asks for other options than those with which the model was loaded. So residency
is a matter of the ``ResidencyKey``: the model, its context length, and the other options that force a reload. What the
probes tell comes late, so a load that was sent counts as loaded at once. Times are seconds of the caller's clock.

The rules are those of Ollama's scheduler (docs/internals/ollama.md, "Queueing"): one runner for each model, one load at
a time, and a runner is unloaded only when none of its requests runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpumesh.balancer.base import ResidencyKey

# A model needs more memory than its file has: the cache of its context, and buffers. Used until it was seen in memory.
FILE_TO_MEMORY = 1.2
# A sent load that no probe and no answer has confirmed after this time has failed, or the model was unloaded since.
UNCONFIRMED_S = 120.0
# A server's own list may be this old when it is read, so it says nothing about a load that was sent within this time.
REPORT_LAG_S = 1.0


@dataclass(slots=True)
class LoadedModel:
    """A model in the server's memory, or about to be. ``key`` is ``None`` if others loaded it: then only its context
    length is known. ``size_mib`` and ``context_length`` are ``None`` until a probe told them.

    ``loading_until`` is the time at which a load that was sent is expected to end; ``None`` once it has ended at
    ``loaded_at``, a time long ago if others loaded it. ``used_at`` is the time of the last request to it, ``noted_at``
    the time when it was last known to be there."""

    key: ResidencyKey | None
    size_mib: int | None = None
    context_length: int | None = None
    loading_until: float | None = None
    loaded_at: float = -math.inf
    used_at: float = 0.0
    noted_at: float = 0.0


ReportedModels = Mapping[str, tuple[int | None, int | None]]
"""The models in memory as a server tells them: by full name the size in MiB and the context length in tokens."""


class Residency:
    """The models in the memory of one server.

    ``is_tracked`` is false for a server that serves what it lists, and loads nothing on request: then every model that
    it lists is resident."""

    def __init__(self, *, is_tracked: bool = True) -> None:
        self.is_tracked = is_tracked
        self.memory_mib: int | None = None
        """The memory that models may take; ``None``: not known."""
        self.file_mib: Mapping[str, int] = {}
        """The sizes of the stored models by full name, as far as the server tells them."""
        self.loaded: dict[str, LoadedModel] = {}  # by the model's full name
        self._known_sizes: dict[str, int] = {}  # in memory, of models that were loaded once
        self._default_context: dict[str, int] = {}  # the context length of requests that ask for none
        self._granted_context: dict[tuple[str, int], int] = {}  # a server may grant less than a request asks for
        self._pushed_out_at: dict[str, float] = {}  # when a load was sent that pushes the model out
        self._fitted_mib = 0  # the most that was in memory at one time: so much fits
        self._fitted_count = 1  # the most models that were in memory at one time

    def __repr__(self) -> str:
        models = ", ".join(name + (" (loading)" if item.loading_until else "") for name, item in self.loaded.items())
        return f"<Residency {models or 'empty'}>"

    # -- questions -----------------------------------------------------------------------------------------------

    def is_resident(self, key: ResidencyKey) -> bool:
        """Whether a request with this key needs no load: the model is in memory with these options, or a load was
        sent."""
        if not self.is_tracked:
            return True
        loaded = self.loaded.get(key.model)
        if loaded is None:
            return False
        if loaded.key is not None:
            return loaded.key == key or (loaded.key.options == key.options and self._same_context(loaded, key))
        return not key.options and self._same_context(loaded, key)

    def _same_context(self, loaded: LoadedModel, key: ResidencyKey) -> bool:
        """Whether the model was loaded with the context length that this key would get."""
        if loaded.context_length is None:
            return loaded.key is None or loaded.key.context == key.context
        if key.context is None:
            wanted = self._default_context.get(key.model)
            return wanted is None or wanted == loaded.context_length
        return self._granted_context.get((key.model, key.context), key.context) == loaded.context_length

    def load_ends_at(self, model: str) -> float | None:
        """The time at which the model's running load is expected to end; ``None`` if it does not load now."""
        loaded = self.loaded.get(model)
        return None if loaded is None else loaded.loading_until

    def next_load_starts_at(self, now: float) -> float:
        """The earliest time at which a further load can start: a server loads one model at a time."""
        return max((item.loading_until for item in self.loaded.values() if item.loading_until is not None), default=now)

    def pushed_out_by(self, key: ResidencyKey, busy: Mapping[str, int]) -> Sequence[str]:
        """The full names of the models that the server would unload to load this one. ``busy``: the number of running
        requests by model.

        The model itself is among them if it is loaded with other options. While it is not known how much fits, a
        further model is taken to push out the others, unless so many were seen in memory together."""
        if key.model in self.loaded:
            return (key.model,)
        if not self.loaded:
            return ()
        needed_mib = self._expected_mib(key.model)
        sizes = {name: item.size_mib or self._expected_mib(name) for name, item in self.loaded.items()}
        pushed_out: list[str] = []
        # Ollama unloads first what no request uses, and of this what was not used for longest.
        candidates = sorted(self.loaded, key=lambda name: (busy.get(name, 0) > 0, self.loaded[name].used_at))
        for name in candidates:
            rest = [size for other, size in sizes.items() if other not in pushed_out]
            if self._fits(needed_mib, rest):
                break
            pushed_out.append(name)
        return pushed_out

    def _fits(self, needed_mib: int | None, others: Sequence[int | None]) -> bool:
        """Whether a model of this size fits beside models of these sizes."""
        if not others:
            return True
        known = [size for size in others if size is not None]
        if needed_mib is None or len(known) < len(others):
            return len(others) < self._fitted_count
        return needed_mib + sum(known) <= max(self._fitted_mib, self.memory_mib or 0)

    def _expected_mib(self, model: str) -> int | None:
        """About how much memory the model takes; ``None`` if neither it nor its file was ever seen."""
        known_mib = self._known_sizes.get(model)
        if known_mib is not None:
            return known_mib
        file_mib = self.file_mib.get(model)
        return None if file_mib is None else int(file_mib * FILE_TO_MEMORY)

    # -- changes -------------------------------------------------------------------------------------------------

    def note_sent(self, key: ResidencyKey, pushed_out: Sequence[str], *, now: float, load_s: float) -> None:
        """A request was sent that makes the server load the model. From now on the model counts as loaded, and what it
        pushes out does not. The load is expected to take ``load_s`` from now."""
        for name in pushed_out:
            self.loaded.pop(name, None)
            self._pushed_out_at[name] = now
        size_mib = self._expected_mib(key.model)
        self.loaded[key.model] = LoadedModel(key, size_mib, None, now + load_s, used_at=now, noted_at=now)

    def note_use(self, model: str, now: float) -> bool:
        """A request was sent to a model that is in memory. Returns whether the model is still loading."""
        loaded = self.loaded.get(model)
        if loaded is None:  # what this server has in memory is not tracked
            return False
        loaded.used_at = now
        return loaded.loading_until is not None

    def note_answer(self, key: ResidencyKey, now: float) -> None:
        """The server has answered this request, so the model is in memory with these options."""
        loaded = self.loaded.get(key.model)
        if loaded is None:
            # While another model loads, this answer may be one of the last before its model is unloaded.
            if self.is_tracked and self.next_load_starts_at(now) <= now:
                self.loaded[key.model] = LoadedModel(key, self._expected_mib(key.model), used_at=now, noted_at=now)
            return
        if loaded.key != key:
            if not self.is_resident(key):
                loaded.context_length = None  # it was loaded anew, with another context
            loaded.key = key
        if loaded.loading_until is not None:
            loaded.loading_until, loaded.loaded_at = None, now
        loaded.noted_at = now

    def note_failed_load(self, model: str) -> None:
        """The server could not load the model."""
        self.loaded.pop(model, None)

    def replace_with_report(self, reported: ReportedModels, *, asked_at: float) -> list[str]:
        """Takes over the server's own list: size in MiB and context length by full name. The server was asked at
        ``asked_at``. Returns the models that are not in memory any more.

        What was noted after the server was asked stays: the list is too old to know it."""
        gone: list[str] = []
        for name, loaded in list(self.loaded.items()):
            if name in reported:
                continue
            is_awaited = loaded.loading_until is not None and asked_at - loaded.noted_at < UNCONFIRMED_S
            if is_awaited or loaded.noted_at > asked_at - REPORT_LAG_S:
                continue
            del self.loaded[name]
            gone.append(name)
        for name, (size_mib, context_length) in reported.items():
            self._note_reported(name, size_mib, context_length, asked_at)
        sizes = [size for size, _ in reported.values()]
        self._fitted_count = max(self._fitted_count, len(sizes))
        self._fitted_mib = max(self._fitted_mib, sum(size or 0 for size in sizes))
        return gone

    def _note_reported(self, name: str, size_mib: int | None, context_length: int | None, asked_at: float) -> None:
        if size_mib is not None:
            self._known_sizes[name] = size_mib
        loaded = self.loaded.get(name)
        if loaded is None:
            pushed_out_at = self._pushed_out_at.get(name, -math.inf)
            is_loading = self.next_load_starts_at(asked_at) > asked_at
            if name in self._pushed_out_at and (is_loading or asked_at <= pushed_out_at + REPORT_LAG_S):
                return  # the list is older than the load that pushes this model out, or the model is drained
            self._pushed_out_at.pop(name, None)
            self.loaded[name] = LoadedModel(None, size_mib, context_length, noted_at=asked_at)
            return
        if loaded.noted_at > asked_at and loaded.loading_until is not None:
            return  # the list may show the runner that this load replaces
        loaded.size_mib = size_mib
        key = loaded.key
        # A request without a context may have made the server load the model anew: nobody knew the server's default.
        shows_default = key is not None and key.context is None and name not in self._default_context
        if key is not None and context_length is not None and (loaded.context_length is None or shows_default):
            if key.context is None:
                self._default_context[name] = context_length
            else:
                self._granted_context[name, key.context] = context_length
        elif loaded.context_length != context_length:
            loaded.key = None  # somebody else's request has loaded it anew
        loaded.context_length = context_length
