"""A simulated inference server. It loads, evicts, queues and generates as Ollama does (server/sched.go).

- A request for a model in memory, with the same context length, goes to its runner. Past the runner's slots it waits
  there, first come first served. All other requests wait for a load, first come first served. A request for the model
  that is loading, but with another context length, joins them when this load has ended.
- One load at a time. If memory is short, one runner must go: the first idle runner by name, otherwise the first runner
by name. It is drained first, and no other load begins until it is gone. But it still takes requests for its own model.
So a stream of such requests can delay the load for ever, as in Ollama.
- A request with another ``num_ctx`` drains the model's runner and loads it again.
- The counters are those of Ollama's final frame: ``load_duration`` covers the whole wait for the runner. The wait for a
slot is only in the total.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.outcomes import Outcome
from gpumesh.bench.simulate.fleet import Fault, FaultKind, NodeSpec
from gpumesh.bench.simulate.requests import Attempt
from gpumesh.bench.simulate.servers.gpu import ROUNDING_S, SharedGpu
from gpumesh.bench.simulate.servers.lies import ServerLies
from gpumesh.bench.simulate.servers.runner import Runner

MAX_FILL = 0.8  # a model is loaded beside others only if it needs at most this share of the free memory

Ended = tuple[Attempt, Outcome, ServerCounters | None]
"""An attempt that has ended, how, and the server's counters; ``None`` without an answer."""


class SimulatedServer:
    """The server of one node.

    ``accept`` and ``advance`` change its state. New first tokens and ended attempts are added to ``first_tokens`` and
    ``ended``; the caller empties both. ``revision`` grows with each change, ``arrivals`` with each call of ``accept``.
    ``loads`` counts the loads, ``prompt_tokens`` the tokens of all prompts that came, ``read_tokens`` the tokens of
    these that were not in a cache.
    """

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.gpu = SharedGpu(share=spec.share, prefill_stall=spec.prefill_stall, prefill_lanes=spec.prefill_lanes)
        self.runners: dict[str, Runner] = {}  # by the full name of the model
        self.pending: deque[Attempt] = deque()  # attempts that wait for a load: see ``find_waiting_for_load``
        self.running: dict[Attempt, Runner] = {}  # attempts that have a slot
        self.loading: Runner | None = None  # the runner that is being loaded
        self.load_ends_at = math.inf
        self.first_tokens: list[Attempt] = []
        self.ended: list[Ended] = []
        self.is_up = True
        self.revision = 0
        self.arrivals = 0
        self._is_busy = False  # the fault BUSY
        self.lies = ServerLies(spec)
        self.loads = 0
        self.read_tokens = 0
        self.prompt_tokens = 0
        self._loaded: dict[str, tuple[int, int]] | None = None  # the cache of ``loaded_models``
        for name in spec.loaded:
            runner = Runner(spec.models[name], spec.context, spec, 0.0)
            runner.is_ready = True
            self.runners[name] = runner

    def __repr__(self) -> str:
        return f"<SimulatedServer {self.spec.name} {len(self.running)} running, {len(self.pending)} pending>"

    @property
    def next_event_at(self) -> float:
        """The time at which ``advance`` must be called; infinite if nothing will happen by itself."""
        return min(self.gpu.next_event_at, self.load_ends_at)

    def loaded_models(self, now: float) -> Mapping[str, tuple[int, int]]:
        """The models in memory with their sizes in MiB and their context lengths, as ``/api/ps`` lists them. Models
        that are still loading are included."""
        self._unload_unused(now)
        if self._loaded is None:
            self._loaded = {name: (int(runner.spec.vram_mib), runner.context) for name, runner in self.runners.items()}
        return self._loaded

    # -- requests come -------------------------------------------------------------------------------------------

    def accept(self, attempt: Attempt, now: float) -> None:
        """Takes a request that has arrived at the server, or refuses it."""
        attempt.arrived_at = now
        self.arrivals += 1
        self.revision += 1
        if not self.is_up:
            self.ended.append((attempt, Outcome.UNREACHABLE, None))
            return
        if self._is_busy:
            self.ended.append((attempt, Outcome.SERVER_ERROR, None))
            return
        request = attempt.job.request
        if not self.lies.has_model(request.model):
            self.ended.append((attempt, Outcome.MODEL_NOT_FOUND, None))
            return
        self.prompt_tokens += attempt.job.prompt_tokens
        runner = self._usable_runner(attempt, now)
        if runner is not None:
            self._join(runner, attempt, now)
        elif self.loading is not None and self.loading.spec.name == request.model:
            self.loading.misfits.append(attempt)
        elif len(self.pending) >= self.spec.max_pending:
            self.ended.append((attempt, Outcome.SERVER_ERROR, None))
        else:
            self.pending.append(attempt)
            self._process_pending(now)

    def _usable_runner(self, attempt: Attempt, now: float) -> Runner | None:
        """The runner that can serve the attempt without a load; ``None`` if there is none. A runner that is still
        loading is usable: the attempt waits there. Unloads the model's runner if its keep_alive is over."""
        request = attempt.job.request
        runner = self.runners.get(request.model)
        if runner is None or runner.context != (request.context or self.spec.context):
            return None
        if runner.users == 0 and now - runner.last_used_at > self.spec.keep_alive_s:
            self._unload(runner)
            return None
        return runner

    def _join(self, runner: Runner, attempt: Attempt, now: float) -> None:
        """Gives the attempt to the runner: it gets a slot, or waits there."""
        runner.users += 1
        if not runner.is_ready:
            runner.waiting.append(attempt)
            return
        attempt.ready_at = now
        if runner.free_slots:
            self._start(runner, attempt, now)
        else:
            runner.waiting.append(attempt)

    def _start(self, runner: Runner, attempt: Attempt, now: float) -> None:
        """Gives the attempt a slot, which must be free, and begins to read its prompt."""
        job = attempt.job
        slot, cached_tokens = runner.take_slot(job.request)
        unread_tokens = max(job.prompt_tokens - cached_tokens, 1)  # the last token of a prompt is always read
        attempt.slot = slot
        attempt.slot_at = now
        attempt.unread_tokens = unread_tokens
        attempt.prefill_s = unread_tokens / runner.spec.prefill_tokens_per_s
        attempt.decode_s = job.tokens_left / runner.spec.tokens_per_s
        self.read_tokens += unread_tokens
        self.running[attempt] = runner
        self.gpu.start_prefill(attempt, now)

    # -- models come and go --------------------------------------------------------------------------------------

    def _process_pending(self, now: float) -> None:
        """Starts the load for the first pending attempt, or begins to make room for it. Gives attempts to their runner
        if it can serve them now."""
        while self.pending and self.loading is None:
            attempt = self.pending[0]
            runner = self._usable_runner(attempt, now)
            if runner is not None:
                self.pending.popleft()
                self._join(runner, attempt, now)
                continue
            request = attempt.job.request
            self._unload_unused(now)
            # If this model is in memory with another context length, that runner must go. Otherwise another runner must
            # go if its memory is needed.
            to_unload = self.runners.get(request.model) or find_runner_to_unload(self.spec, self.runners, request.model)
            if to_unload is not None and to_unload.users > 0:
                to_unload.is_expiring = True  # ``_leave`` calls this method again when the last user has left
                return
            if to_unload is not None:
                self._unload(to_unload)
                continue
            self.pending.popleft()
            self._start_load(attempt, now)

    def _start_load(self, attempt: Attempt, now: float) -> None:
        """Starts to load the attempt's model. The attempt waits at the new runner."""
        request = attempt.job.request
        context = request.context or self.spec.context
        runner = Runner(self.spec.models[request.model], context, self.spec, now)
        self.runners[request.model] = runner
        self._loaded = None
        self.loading = runner
        self.load_ends_at = now + runner.spec.load_s
        self.loads += 1
        self._join(runner, attempt, now)

    def _unload_unused(self, now: float) -> None:
        """Unloads the models that were not used for ``keep_alive_s``."""
        for runner in list(self.runners.values()):
            if runner.users == 0 and runner.is_ready and now - runner.last_used_at > self.spec.keep_alive_s:
                self._unload(runner)

    def _unload(self, runner: Runner) -> None:
        del self.runners[runner.spec.name]
        self._loaded = None

    # -- time passes ---------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Does all that is due at ``now``. Must be called at ``next_event_at``, not later."""
        self.revision += 1
        read, answered = self.gpu.advance(now)
        for attempt in read:
            attempt.has_first_token = True
            attempt.first_token_at = now
            self.first_tokens.append(attempt)
        for attempt in answered:
            self.ended.append((attempt, Outcome.SERVED, self.lies.final_counters(attempt, now)))
            self._leave(attempt, now)
        if self.load_ends_at <= now + ROUNDING_S:
            self._finish_load(now)

    def _finish_load(self, now: float) -> None:
        """Ends the running load: the requests that waited for it get slots, and the next load may begin."""
        runner = self.loading
        assert runner is not None
        self.loading = None
        self.load_ends_at = math.inf
        runner.is_ready = True
        runner.last_used_at = now
        for attempt in runner.waiting:
            attempt.ready_at = now
        self._fill_slots(runner, now)
        self.pending.extend(runner.misfits)
        runner.misfits.clear()
        self._process_pending(now)

    def _leave(self, attempt: Attempt, now: float) -> None:
        """Frees the attempt's slot, and gives it to the next waiting attempt. Unloads the runner if it must go and has
        no users any more."""
        runner = self.running.pop(attempt)
        runner.free_slots.append(attempt.slot)
        runner.users -= 1
        runner.last_used_at = now
        if runner.waiting:
            self._fill_slots(runner, now)
        if runner.users == 0 and runner.is_expiring:
            self._unload(runner)
            self._process_pending(now)

    def _fill_slots(self, runner: Runner, now: float) -> None:
        """Gives the runner's free slots to the attempts that wait there."""
        while runner.waiting and runner.free_slots:
            self._start(runner, runner.waiting.popleft(), now)

    # -- faults --------------------------------------------------------------------------------------------------

    def change_fault(self, fault: Fault, now: float, *, starts: bool) -> None:
        """The fault begins, or ends."""
        self.revision += 1
        factor = fault.factor if starts else 1.0
        if fault.kind is FaultKind.AWAY:
            self.is_up = not starts
            if starts:
                self._lose_connection(now)
        elif fault.kind is FaultKind.SLOW:
            self.gpu.set_factor(factor, now)
        elif fault.kind is FaultKind.BUSY:
            self._is_busy = starts
        else:
            self.lies.change(fault, starts=starts)

    def _lose_connection(self, now: float) -> None:
        """Ends all attempts, as Ollama does when its clients have gone. The models stay in memory."""
        waiting = [attempt for runner in self.runners.values() for attempt in runner.waiting]
        for attempt in (*self.running, *waiting, *find_waiting_for_load(self)):
            if attempt.has_first_token:
                share = self.gpu.decoded_share(attempt, now)
                tokens = min(int(share * attempt.job.tokens_left), attempt.job.tokens_left - 1)
                attempt.job.tokens_left -= tokens  # another node continues the answer
                attempt.job.prompt_tokens += tokens
            self.ended.append((attempt, Outcome.CUT if attempt.has_first_token else Outcome.UNREACHABLE, None))
        for attempt, runner in self.running.items():
            runner.free_slots.append(attempt.slot)
        self.gpu.clear(now)
        self.running.clear()
        self.pending.clear()
        for runner in list(self.runners.values()):
            runner.waiting.clear()
            runner.misfits.clear()
            runner.users = 0
            runner.last_used_at = now
            if runner.is_expiring:
                self._unload(runner)


def find_waiting_for_load(server: SimulatedServer) -> list[Attempt]:
    """The attempts that no runner in memory will serve."""
    return [*server.pending, *(() if server.loading is None else server.loading.misfits)]


def find_runner_to_unload(spec: NodeSpec, runners: Mapping[str, Runner], model: str) -> Runner | None:
    """The runner that must be unloaded so that this model can be loaded; ``None`` if it can be loaded now.

    A runner that is expiring comes first: it has been chosen already. Then comes the first idle runner by name, then
    the first runner by name. (Ollama first orders by keep_alive, which is the same for all runners here.)
    """
    used_mib = sum(runner.spec.vram_mib for runner in runners.values())
    fits = spec.vram_mib is None or spec.models[model].vram_mib <= MAX_FILL * (spec.vram_mib - used_mib)
    may_load_more = len(runners) < spec.max_loaded
    # Without other runners, also a model that does not fit is loaded: in part.
    if not runners or (fits and may_load_more):
        return None
    expiring = [runner for runner in runners.values() if runner.is_expiring]
    if expiring:
        return expiring[0]
    by_name = sorted(runners.values(), key=lambda runner: runner.spec.name)
    return next((runner for runner in by_name if runner.users == 0), by_name[0])
