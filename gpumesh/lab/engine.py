"""Simulates the inference of one host: models in memory, slots, prefill and token times, GPU load. No text, no HTTP.

A request takes the times that Ollama's own counters tell: load, wait for a slot, prefill, then one token each
``1 / rate`` seconds. Each token has a time on the absolute clock: if one token is late, the next tokens are not. So
``eval_count / eval_duration`` is exactly the rate of the profile, and a client measures the same rate.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from gpumesh.lab.keep_alive import parse_keep_alive
from gpumesh.lab.profile import Faults, HostProfile, ModelProfile
from gpumesh.lab.text import count_tokens

IDLE_MIB = 4
"""The used memory of a 4090 on which no program runs."""

STORED_AT = datetime(2026, 9, 1, tzinfo=UTC)
"""Hosts stored their models before this time. It is fixed, so that a restart of a host does not change the times."""


@dataclass(frozen=True, slots=True)
class Timings:
    """An answer's counters. The durations are in ns, as in Ollama's answers."""

    total_ns: int = 0
    load_ns: int = 0
    prompt_tokens: int = 0
    prompt_ns: int = 0
    tokens: int = 0
    eval_ns: int = 0


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


class Pacer:
    """Waits for the time when each token of an answer is due: token ``n`` is due at ``start + n / rate``.

    ``total`` is the number of tokens, ``rate`` is in tokens/s, ``start`` is the end of prefill on ``clock``. ``sent``
    is the number of tokens that the caller has sent, or will send now.
    """

    def __init__(self, total: int, rate: float, clock: Callable[[], float], start: float) -> None:
        self._total = total
        self._rate = rate
        self._clock = clock
        self._start = start
        self.sent = 0

    async def wait_due(self) -> int:
        """Waits until the next token is due. Returns how many tokens of the answer are due then, and sets ``sent``.

        The number counts the tokens from the start of the answer. It grows by more than 1 if the caller is late.
        """
        if math.isinf(self._rate):  # all tokens are due at once
            self.sent = self._total
            return self.sent
        wait_s = self._start + (self.sent + 1) / self._rate - self._clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        elapsed_s = self._clock() - self._start
        due = int(elapsed_s * self._rate + 1e-6)  # with 1e-6, a rounding error does not hide a token that is due
        self.sent = min(self._total, max(self.sent + 1, due))
        return self.sent


@dataclass(slots=True, eq=False)
class Runner:
    """A model in memory, with its slots and its prefix cache."""

    model: ModelProfile
    reload_options: tuple[object, ...]
    """The values of ``RELOAD_OPTIONS`` with which the model was loaded. Other values need a reload."""
    slots: asyncio.Semaphore
    expires_at: float
    """The time on the engine's clock at which the model is unloaded; ``inf``: never."""
    context_length: int
    """In tokens."""
    loading: bool = False
    users: int = 0
    """The number of requests that hold a slot or wait for a slot."""
    prompts: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """The cache of prefixes: the latest prompts, at most one for each slot, the oldest first."""


@dataclass(frozen=True, slots=True)
class SlotLease:
    """A slot that a request holds. The rates are in tokens/s.

    ``load_s`` is the time that the request waited for the model's load, ``queued_s`` the time that the request then
    waited for the slot.
    """

    runner: Runner
    rate: float
    prefill_rate: float
    load_s: float
    queued_s: float


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """The load that nvidia-smi shows.

    ``busy`` is the use of the GPU, from 0 to 1. ``warmth`` is a slower average of it, for the temperature and the fan.
    ``models`` are the models in memory: the name and the memory in MiB of each.
    """

    busy: float = 0.0
    warmth: float = 0.0
    models: tuple[tuple[str, int], ...] = ()


class Engine:
    """The inference of one host: its stored models, the models in memory (runners), and the slots.

    All calls must come from one event loop. ``faults`` may change at any time. ``store`` holds the model and the time
    when it was stored, by the model's name. ``loads`` counts the loads of models; ``running`` is the number of requests
    with a slot, ``max_running`` the largest such number.
    """

    def __init__(self, profile: HostProfile, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.profile = profile
        self.faults = Faults()
        self.clock = clock
        self.store: dict[str, tuple[ModelProfile, datetime]] = {}
        for number, model in enumerate(profile.models):  # the first model is the latest, each other one a day older
            age = timedelta(days=number, microseconds=hash_us(profile.hostname, model.name))
            self.store[model.name] = (model, STORED_AT - age)
        self.runners: dict[str, Runner] = {}  # by the model's name
        self.loads = 0
        self.running = 0
        self.max_running = 0
        self._runner_lock = asyncio.Lock()  # one request at a time loads a model or joins a runner
        self._runner_released = asyncio.Event()
        self._busy = UsageAverage(tau_s=0.3, clock=clock)  # follows the load almost at once
        self._warmth = UsageAverage(tau_s=15.0, clock=clock)  # a card becomes warm and cold slowly
        default_options = (None,) * len(RELOAD_OPTIONS)  # ``None``: the default
        for model in profile.models:
            if model.resident:
                self.runners[model.name] = self._new_runner(model, default_options)

    def find_model(self, name: str) -> ModelProfile | None:
        """The stored model of this name; ``None`` if there is none. A name without a tag means ``:latest``."""
        entry = self.store.get(name) or self.store.get(f"{name}:latest")
        if entry is None:
            return None
        model, _stored_at = entry
        return model

    @asynccontextmanager
    async def lease_slot(
        self, model: ModelProfile, options: dict[str, object], keep_alive: object
    ) -> AsyncIterator[SlotLease]:
        """Loads the model if needed, waits for a slot, and yields the slot. First come, first served.

        ``options`` and ``keep_alive`` are those of the request. The slot is given back at the end of the context.
        """
        asked_at = self.clock()
        runner = await self._acquire_runner(model, options)
        loaded_at = self.clock()
        slot_is_held = False
        try:
            await runner.slots.acquire()
            slot_is_held = True
            self._count_running(+1)
            speed = model.speed / self.faults.slow
            yield SlotLease(
                runner,
                rate=_rate(self.profile.tokens_per_s) * speed,
                prefill_rate=_rate(self.profile.prefill_tokens_per_s) * speed,
                load_s=loaded_at - asked_at,
                queued_s=self.clock() - loaded_at,
            )
        finally:
            if slot_is_held:
                runner.slots.release()
                self._count_running(-1)
            self._release_runner(runner, keep_alive)

    async def preload(self, model: ModelProfile, options: dict[str, object], keep_alive: object) -> None:
        """Does what an empty prompt asks for: loads the model, or unloads the model if ``keep_alive`` is 0."""
        if parse_keep_alive(keep_alive, self.profile.keep_alive_s) == 0:
            runner = self.runners.get(model.name)
            if runner is not None:
                runner.expires_at = self.clock()
                self.expire_runners()
            return
        runner = await self._acquire_runner(model, options)
        self._release_runner(runner, keep_alive)

    async def prefill(self, lease: SlotLease, prompt: str) -> tuple[int, float]:
        """Waits for the time that prefill takes. Returns the number of the prompt's tokens, and this time in seconds.

        Tokens in the prefix cache take no time, but are counted.
        """
        tokens = count_tokens(prompt)
        if math.isinf(lease.prefill_rate):  # prefill takes no time
            return tokens, 0.0
        new_tokens = max(1, tokens - self._use_cache(lease.runner, prompt))  # the last token is always computed
        seconds = new_tokens / lease.prefill_rate
        await asyncio.sleep(seconds)
        return tokens, seconds

    def list_runners(self) -> list[Runner]:
        """The models in memory, and the models that load."""
        self.expire_runners()
        return list(self.runners.values())

    def expire_runners(self) -> None:
        """Unloads the models whose time has passed, unless they are in use or still load."""
        now = self.clock()
        for name, runner in list(self.runners.items()):
            if runner.users == 0 and not runner.loading and runner.expires_at <= now:
                del self.runners[name]

    def vram_mib(self, model: ModelProfile) -> int:
        """The GPU memory that the model uses on this host when it is loaded, in MiB."""
        return 0 if self.faults.on_cpu else model.vram_mib

    def gpu_load(self) -> GpuLoad:
        """The load of the host's GPUs at this moment.

        ``Faults.foreign_load`` is the least value of ``busy`` and ``warmth``: so much the other programs use.
        """
        self.expire_runners()
        foreign = self.faults.foreign_load
        return GpuLoad(
            busy=max(self._busy.update(), foreign),
            warmth=max(self._warmth.update(), foreign),
            models=tuple((runner.model.name, self.vram_mib(runner.model)) for runner in self.runners.values()),
        )

    def _new_runner(self, model: ModelProfile, reload_options: tuple[object, ...]) -> Runner:
        """Makes a runner with these values of ``RELOAD_OPTIONS``. The caller adds it to ``runners``."""
        num_ctx = reload_options[RELOAD_OPTIONS.index("num_ctx")]
        context_length = num_ctx if isinstance(num_ctx, int) else default_context(model)
        slots = 1 if model.embedding else self.profile.slots  # as in Ollama
        expires_at = self.clock() + self.profile.keep_alive_s
        return Runner(model, reload_options, asyncio.Semaphore(slots), expires_at, context_length=context_length)

    async def _acquire_runner(self, model: ModelProfile, options: dict[str, object]) -> Runner:
        """Returns the model's runner, after loading the model if needed, and adds one to the runner's ``users``.

        One call at a time: while a model loads, all later requests wait, as in Ollama.
        """
        reload_options = _read_reload_options(options, model)
        async with self._runner_lock:
            self.expire_runners()
            runner = self.runners.get(model.name)
            if runner is None or runner.reload_options != reload_options:
                runner = await self._load_runner(model, reload_options)
            runner.users += 1
            runner.expires_at = math.inf  # a model in use does not expire; ``_release_runner`` sets the time
            return runner

    async def _load_runner(self, model: ModelProfile, reload_options: tuple[object, ...]) -> Runner:
        """Loads the model. A runner of the model with other options is unloaded before, as soon as it has no users."""
        while model.name in self.runners and self.runners[model.name].users:
            await self._wait_for_release()
        self.runners.pop(model.name, None)
        await self._free_memory(self.vram_mib(model))
        runner = self._new_runner(model, reload_options)
        runner.loading = True
        self.runners[model.name] = runner
        try:
            if self.profile.load_s > 0:
                await asyncio.sleep(self.profile.load_s / model.speed)
        except asyncio.CancelledError:  # the client has gone: an incomplete load is given up
            del self.runners[model.name]
            raise
        runner.loading = False
        self.loads += 1
        return runner

    async def _free_memory(self, needed_mib: int) -> None:
        """Unloads models until ``needed_mib`` of GPU memory are free, first the model that expires first.

        Waits while all models are in use. A model that is larger than the memory is loaded when no other model is left.
        """
        total_mib = sum(gpu.memory_mib - IDLE_MIB for gpu in self.profile.gpus)
        while self.runners:
            used_mib = sum(self.vram_mib(runner.model) for runner in self.runners.values())
            if used_mib + needed_mib <= total_mib:
                return
            unused = [runner for runner in self.runners.values() if not runner.users]
            if unused:
                soonest = min(unused, key=lambda runner: runner.expires_at)
                del self.runners[soonest.model.name]
            else:
                await self._wait_for_release()

    async def _wait_for_release(self) -> None:
        """Waits until the next request has ended its use of a runner."""
        self._runner_released.clear()
        await self._runner_released.wait()

    def _release_runner(self, runner: Runner, keep_alive: object) -> None:
        """Ends one request's use of the runner. The runner stays in memory for ``keep_alive``."""
        runner.users -= 1
        runner.expires_at = self.clock() + parse_keep_alive(keep_alive, self.profile.keep_alive_s)
        self.expire_runners()
        self._runner_released.set()

    def _count_running(self, change: int) -> None:
        """Adds ``change`` to the number of requests with a slot. The GPU is busy while there is such a request."""
        self.running += change
        self.max_running = max(self.max_running, self.running)
        target = 1.0 if self.running else 0.0
        self._busy.set_target(target)
        self._warmth.set_target(target)

    def _use_cache(self, runner: Runner, prompt: str) -> int:
        """Returns how many tokens of the prompt's start are in the cache, and adds the prompt. 0 without a cache."""
        if not self.profile.prefix_cache:
            return 0
        cached_length = max((_common_prefix_length(prompt, cached) for cached in runner.prompts), default=0)
        runner.prompts[prompt] = None
        runner.prompts.move_to_end(prompt)
        while len(runner.prompts) > self.profile.slots:
            runner.prompts.popitem(last=False)
        return count_tokens(prompt[:cached_length])


RELOAD_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
"""The options of a request that need a reload of the model if their values differ from those of the loaded model."""


def _read_reload_options(options: Mapping[str, object], model: ModelProfile) -> tuple[object, ...]:
    """The request's values of ``RELOAD_OPTIONS``, in this order; ``None``: the default.

    A ``num_ctx`` that equals the default context counts as the default: it needs no reload.
    """
    values = {name: options.get(name) for name in RELOAD_OPTIONS}
    if values["num_ctx"] == default_context(model):
        values["num_ctx"] = None
    return tuple(values.values())


def _rate(tokens_per_s: float | None) -> float:
    """The rate in tokens/s as a number: ``None`` in a profile (no time at all) is an infinite rate."""
    return math.inf if tokens_per_s is None else tokens_per_s


def default_context(model: ModelProfile) -> int:
    """Ollama's default context in tokens on a host with 23 GiB of GPU memory or more."""
    return min(model.context_length, 32768)


def hash_us(*parts: str) -> int:
    """A number of microseconds, less than a day, that depends only on these names: each host and model has its own."""
    microseconds_per_day = 86_400_000_000
    return zlib.crc32("/".join(parts).encode()) % microseconds_per_day


def _common_prefix_length(first: str, second: str) -> int:
    """The number of characters that both texts begin with. A binary search, because prompts may be long."""
    equal, limit = 0, min(len(first), len(second))  # the first ``equal`` characters are the same
    while equal < limit:
        middle = (equal + limit + 1) // 2
        if first[equal:middle] == second[equal:middle]:
            equal = middle
        else:
            limit = middle - 1
    return equal
