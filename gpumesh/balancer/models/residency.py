"""``Residency``: which models one server has in its memory, and what a further load would push out. Pure.

A server reloads a model when a request asks for other options than those with which the model was loaded. So residency
is a matter of the ``ResidencyKey``: the model, its context length, and the other options that force a reload. The
probes' reports come late. So as soon as a request was sent that loads a model, the model counts as loaded. Times are
seconds of the caller's clock.

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
# If no probe and no answer has confirmed a load so long after its request was sent, then the load has failed, or the
# model was unloaded since.
UNCONFIRMED_S = 120.0
# A model that is gone so soon after another load was pushed out by that load.
SURPRISE_S = 15.0
# A server's own list may be this old when it is read, so it says nothing about a load that was sent within this time.
REPORT_LAG_S = 1.0


@dataclass(slots=True)
class LoadedModel:
    """A model that is in the server's memory, or will soon be there. ``key`` is ``None`` if another program's request
    loaded the model: then only its context length is known. ``size_mib`` and ``context_length`` are ``None`` until a
    probe told them.

    ``loading_until`` is the time at which the running load is expected to end; ``None`` if the load has ended. It ended
    at ``loaded_at``; that is minus infinity if this gateway did not see the load. ``used_at`` is the time of the last
    request to the model, ``noted_at`` the time when it was last known to be in memory."""

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
        self._most_loaded: int | None = None  # the server's own limit, if a load has shown a limit; else ``None``
        # When the last load was sent that was expected to push out no model.
        self._last_load_without_eviction_at = -math.inf

    def __repr__(self) -> str:
        models = ", ".join(name + (" (loading)" if item.loading_until else "") for name, item in self.loaded.items())
        return f"<Residency {models or 'empty'}>"

    # -- questions -----------------------------------------------------------------------------------------------

    def is_resident(self, key: ResidencyKey) -> bool:
        """Whether a request with this key needs no load: the model is in memory with the same context length and
        options, or such a load was sent."""
        if not self.is_tracked:
            return True
        loaded = self.loaded.get(key.model)
        if loaded is None:
            return False
        if loaded.key is None:
            # Another program loaded it, with unknown options: we assume the usual options.
            return not key.options and self._same_context(loaded, key)
        if loaded.key == key:  # a shortcut for the usual case: the line below would find the same
            return True
        return loaded.key.options == key.options and self._same_context(loaded, key)

    def _same_context(self, loaded: LoadedModel, key: ResidencyKey) -> bool:
        """Whether the model was loaded with the context length that a request with this key would get. An unknown
        length is assumed to be the same."""
        if loaded.context_length is None:
            return loaded.key is None or loaded.key.context == key.context
        if key.context is None:
            default = self._default_context.get(key.model)
            return default is None or default == loaded.context_length
        granted = self._granted_context.get((key.model, key.context), key.context)
        return granted == loaded.context_length

    def load_ends_at(self, model: str) -> float | None:
        """The time at which the model's running load is expected to end; ``None`` if it does not load now."""
        loaded = self.loaded.get(model)
        return None if loaded is None else loaded.loading_until

    def next_load_starts_at(self, now: float) -> float:
        """The time at which a further load can start: when the last of the running loads ends, because a server loads
        one model at a time. ``now`` if none runs."""
        load_ends = (model.loading_until for model in self.loaded.values())
        return max((end for end in load_ends if end is not None), default=now)

    def pushed_out_by(self, key: ResidencyKey, busy: Mapping[str, int]) -> Sequence[str]:
        """The full names of the models that the server would unload to load this one. ``busy``: the number of running
        requests by model.

        If the model itself is loaded with other options, only that copy of it must go. While it is not known how much
        memory there is, we assume that one more model pushes out the others, unless so many models were seen in memory
        together."""
        if key.model in self.loaded:
            return (key.model,)
        if not self.loaded:
            return ()
        needed_mib = self._expected_mib(key.model)
        sizes = {name: item.size_mib or self._expected_mib(name) for name, item in self.loaded.items()}
        pushed_out: list[str] = []
        # The order in which Ollama unloads: first the models that no request uses, and among these first the model
        # whose last use is longest ago.
        candidates = sorted(self.loaded, key=lambda name: (busy.get(name, 0) > 0, self.loaded[name].used_at))
        for name in candidates:
            staying = [size for other, size in sizes.items() if other not in pushed_out]
            if self._fits(needed_mib, staying):
                break
            pushed_out.append(name)
        return pushed_out

    def _fits(self, needed_mib: int | None, others: Sequence[int | None]) -> bool:
        """Whether a model of this size (MiB) fits beside models of these sizes; ``None``: the size is not known. If any
        size is not known, the number of models decides: as many fit as were in memory together before."""
        if not others:  # a server can always try to load one model
            return True
        if self._most_loaded is not None and len(others) >= self._most_loaded:
            return False
        known = [size for size in others if size is not None]
        if needed_mib is None or len(known) < len(others):
            return len(others) < self._fitted_count
        return needed_mib + sum(known) <= max(self._fitted_mib, self.memory_mib or 0)

    def _expected_mib(self, model: str) -> int | None:
        """About how much memory the model takes, in MiB; ``None`` if neither the loaded model nor its file was ever
        seen."""
        known_mib = self._known_sizes.get(model)
        if known_mib is not None:
            return known_mib
        file_mib = self.file_mib.get(model)
        return None if file_mib is None else int(file_mib * FILE_TO_MEMORY)

    # -- changes -------------------------------------------------------------------------------------------------

    def note_sent(self, key: ResidencyKey, pushed_out: Sequence[str], *, now: float, load_s: float) -> None:
        """Notes that the server must load the model for a request that was sent. From now on the model counts as
        loaded, and the models in ``pushed_out`` do not. The load is expected to end in ``load_s`` seconds."""
        for name in pushed_out:
            self.loaded.pop(name, None)
            self._pushed_out_at[name] = now
        if self.loaded and not pushed_out:
            self._last_load_without_eviction_at = now
        size_mib = self._expected_mib(key.model)
        self.loaded[key.model] = LoadedModel(key, size_mib, None, now + load_s, used_at=now, noted_at=now)

    def note_use(self, model: str, now: float) -> bool:
        """Notes that a request was sent to a model that is in memory. Returns whether the model is still loading."""
        loaded = self.loaded.get(model)
        if loaded is None:  # the server's memory is not tracked (``is_tracked``), so it loads nothing
            return False
        loaded.used_at = now
        return loaded.loading_until is not None

    def note_answer(self, key: ResidencyKey, now: float) -> None:
        """Notes that the server has answered a request with this key, so the model is in memory with these options."""
        loaded = self.loaded.get(key.model)
        if loaded is None:
            # While another model loads, this answer may be one of the last before its own model is unloaded. Then the
            # model does not count as loaded again.
            another_loads = self.next_load_starts_at(now) > now
            if self.is_tracked and not another_loads:
                self.loaded[key.model] = LoadedModel(key, self._expected_mib(key.model), used_at=now, noted_at=now)
            return
        if loaded.key != key:
            if not self.is_resident(key):
                loaded.context_length = None  # the model was loaded again, with another context
            loaded.key = key
        if loaded.loading_until is not None:
            loaded.loading_until, loaded.loaded_at = None, now
        loaded.noted_at = now

    def note_unloaded(self, model: str, now: float) -> None:
        """Notes that the server has just unloaded the model, on our request."""
        self.loaded.pop(model, None)
        self._pushed_out_at[model] = now

    def note_failed_load(self, model: str) -> None:
        """Notes that the server could not load the model, so the model is not in memory."""
        self.loaded.pop(model, None)

    def replace_with_report(self, reported: ReportedModels, *, asked_at: float) -> list[str]:
        """Takes over the server's own list of the models in memory. The server was asked at ``asked_at``. Returns the
        full names of the models that are not in memory any more.

        A model that was noted after the server was asked stays: the list is too old to contain it."""
        gone: list[str] = []
        for name, loaded in list(self.loaded.items()):
            if name in reported:
                continue
            may_still_load = loaded.loading_until is not None and asked_at - loaded.noted_at < UNCONFIRMED_S
            is_newer_than_list = loaded.noted_at > asked_at - REPORT_LAG_S
            if may_still_load or is_newer_than_list:
                continue
            del self.loaded[name]
            gone.append(name)
        for name, (size_mib, context_length) in reported.items():
            self._note_reported(name, size_mib, context_length, asked_at)
        if gone and 0.0 <= asked_at - self._last_load_without_eviction_at <= SURPRISE_S:
            # The load has pushed these models out although there seemed to be room: because of
            # OLLAMA_MAX_LOADED_MODELS, or because another program takes memory.
            self._most_loaded = max(len(self.loaded), 1)
        elif self._most_loaded is not None and len(reported) > self._most_loaded:
            self._most_loaded = None
        sizes = [size for size, _ in reported.values()]
        self._fitted_count = max(self._fitted_count, len(sizes))
        self._fitted_mib = max(self._fitted_mib, sum(size or 0 for size in sizes))
        return gone

    def _note_reported(self, name: str, size_mib: int | None, context_length: int | None, asked_at: float) -> None:
        """Takes over one model of the server's list, unless newer events show that this entry is out of date."""
        if size_mib is not None:
            self._known_sizes[name] = size_mib
        loaded = self.loaded.get(name)
        if loaded is None:
            if not self._is_leaving(name, asked_at):
                self._pushed_out_at.pop(name, None)
                self.loaded[name] = LoadedModel(None, size_mib, context_length, noted_at=asked_at)
            return
        if loaded.noted_at > asked_at and loaded.loading_until is not None:
            return  # the list may show the runner that this load replaces
        loaded.size_mib = size_mib
        key = loaded.key
        # A request without a context may have made the server load the model again, before its default was known.
        shows_default = key is not None and key.context is None and name not in self._default_context
        is_load_of_key = loaded.context_length is None or shows_default
        if key is not None and context_length is not None and is_load_of_key:
            # The model was loaded for this key, so the reported context is what a request with this key gets.
            if key.context is None:
                self._default_context[name] = context_length
            else:
                self._granted_context[name, key.context] = context_length
        elif loaded.context_length != context_length:
            loaded.key = None  # another program's request has loaded the model with another context
        loaded.context_length = context_length

    def _is_leaving(self, name: str, asked_at: float) -> bool:
        """Whether a model that the server listed at ``asked_at`` was pushed out by a load, and has left the memory
        since then, or will leave it soon. While another model loads, its load may still wait for the requests of this
        one."""
        pushed_out_at = self._pushed_out_at.get(name)
        if pushed_out_at is None:
            return False
        another_loads = self.next_load_starts_at(asked_at) > asked_at
        is_list_older = asked_at <= pushed_out_at + REPORT_LAG_S
        return another_loads or is_list_older
