"""The simulated inference: models in memory, slots, and time. No text and no HTTP here.

The times are those of Ollama's own counters: load, wait for a slot, prefill, then one token each ``1 / rate`` seconds.
Each token has a time on the absolute clock: if one is late, the next ones are not. So ``eval_count / eval_duration`` is
exactly the rate of the profile, and a client measures the same rate.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from gpumesh.lab.profile import Faults, HostProfile, ModelProfile
from gpumesh.lab.text import count_tokens

IDLE_MIB = 4
"""The used memory of a 4090 on which nothing runs."""

STORED_AT = datetime(2026, 9, 1, tzinfo=UTC)
"""Hosts stored their models at this time, minus a time that depends on their names. A restart does not change it."""


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
    """How busy a GPU was lately, 0 to 1: an exponential average with the time constant ``tau_s``."""

    def __init__(self, tau_s: float, clock: Callable[[], float]) -> None:
        self._tau_s = tau_s
        self._clock = clock
        self._at = clock()
        self._value = 0.0
        self._target = 0.0

    def set_target(self, target: float) -> None:
        self.update()
        self._target = target

    def update(self) -> float:
        """Moves the average to now, and returns it."""
        now = self._clock()
        self._value += (self._target - self._value) * (1.0 - math.exp(-(now - self._at) / self._tau_s))
        self._at = now
        return self._value


class Pacer:
    """Knows when each token is due. ``start`` is the end of prefill; token ``n`` is due at ``start + n / rate``."""

    def __init__(self, total: int, rate: float, clock: Callable[[], float], start: float) -> None:
        self._total = total
        self._rate = rate
        self._clock = clock
        self._start = start
        self.sent = 0

    async def wait_due(self) -> int:
        """Waits until the next token is due. Returns how many tokens are due then, at most the total; sets ``sent`` to
        it."""
        if not math.isinf(self._rate):
            wait = self._start + (self.sent + 1) / self._rate - self._clock()
            if wait > 0:
                await asyncio.sleep(wait)
            elapsed = self._clock() - self._start
            self.sent = min(self._total, max(self.sent + 1, int(elapsed * self._rate + 1e-6)))
        else:
            self.sent = self._total
        return self.sent


@dataclass(slots=True, eq=False)
class Runner:
    """A model in memory. ``reload_options``: a request with other values of these options needs a reload."""

    model: ModelProfile
    reload_options: tuple[object, ...]
    slots: asyncio.Semaphore
    expires_at: float
    """Time on the engine's clock; ``inf``: never."""
    context_length: int
    loading: bool = False
    users: int = 0
    prompts: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """The cache of prefixes: the latest prompts, one for each slot."""


@dataclass(frozen=True, slots=True)
class SlotLease:
    """A held slot. ``load_s`` is the time that this request waited for the model's load, ``queued_s`` for the slot. The
    rates are in tokens/s."""

    runner: Runner
    rate: float
    prefill_rate: float
    load_s: float
    queued_s: float


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """The load that nvidia-smi shows. ``busy`` is from 0 to 1. ``warmth`` is a slower average of it, for the
    temperature and the fan. ``models`` are the models in memory: name and MiB."""

    busy: float = 0.0
    warmth: float = 0.0
    models: tuple[tuple[str, int], ...] = ()


class Engine:
    """The inference of one host. All of it runs on one event loop. ``faults`` may change at any time."""

    def __init__(self, profile: HostProfile, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.profile = profile
        self.faults = Faults()
        self.clock = clock
        self.store: dict[str, tuple[ModelProfile, datetime]] = {
            model.name: (model, STORED_AT - timedelta(days=number, microseconds=hash_us(profile.hostname, model.name)))
            for number, model in enumerate(profile.models)
        }
        self.runners: dict[str, Runner] = {}
        self.loads = 0
        self.running = 0
        self.max_running = 0
        self._scheduler = asyncio.Lock()
        self._released = asyncio.Event()
        self._busy = UsageAverage(0.3, clock)
        self._warmth = UsageAverage(15.0, clock)
        for model in profile.models:
            if model.resident:
                self.runners[model.name] = self._new_runner(model, (None,) * len(RELOAD_OPTIONS))

    def find_model(self, name: str) -> ModelProfile | None:
        """The model of this name. A name without a tag means ``:latest``."""
        entry = self.store.get(name) or self.store.get(f"{name}:latest")
        return entry[0] if entry else None

    @asynccontextmanager
    async def lease_slot(
        self, model: ModelProfile, options: dict[str, object], keep_alive: object
    ) -> AsyncIterator[SlotLease]:
        """A slot of the model, which is loaded first if needed. First come, first served. The slot is always given
        back."""
        asked_at = self.clock()
        runner = await self._acquire_runner(model, options)
        loaded_at = self.clock()
        slot_is_held = False
        try:
            await runner.slots.acquire()
            slot_is_held = True
            self._count_running(+1)
            slow = self.faults.slow
            yield SlotLease(
                runner,
                _rate(self.profile.tokens_per_s) * model.speed / slow,
                _rate(self.profile.prefill_tokens_per_s) * model.speed / slow,
                load_s=loaded_at - asked_at,
                queued_s=self.clock() - loaded_at,
            )
        finally:
            if slot_is_held:
                runner.slots.release()
                self._count_running(-1)
            self._release_runner(runner, keep_alive)

    async def preload(self, model: ModelProfile, options: dict[str, object], keep_alive: object) -> None:
        """Handles an empty prompt: loads the model and keeps it, or unloads it if ``keep_alive`` is 0."""
        if parse_keep_alive(keep_alive, self.profile.keep_alive_s) == 0:
            if (runner := self.runners.get(model.name)) is not None:
                runner.expires_at = self.clock()
                self.expire_runners()
            return
        self._release_runner(await self._acquire_runner(model, options), keep_alive)

    async def prefill(self, lease: SlotLease, prompt: str) -> tuple[int, float]:
        """Waits for the time that the prompt takes, without the tokens in the cache. Returns the number of the prompt's
        tokens, and the seconds."""
        tokens = count_tokens(prompt)
        if math.isinf(lease.prefill_rate):
            return tokens, 0.0
        new_tokens = max(1, tokens - self._use_cache(lease.runner, prompt))
        seconds = new_tokens / lease.prefill_rate
        await asyncio.sleep(seconds)
        return tokens, seconds

    def list_runners(self) -> list[Runner]:
        self.expire_runners()
        return list(self.runners.values())

    def expire_runners(self) -> None:
        """Unloads the models whose time has passed, unless they are in use."""
        now = self.clock()
        for name, runner in list(self.runners.items()):
            if runner.users == 0 and not runner.loading and runner.expires_at <= now:
                del self.runners[name]

    def vram_mib(self, model: ModelProfile) -> int:
        return 0 if self.faults.on_cpu else model.vram_mib

    def gpu_load(self) -> GpuLoad:
        self.expire_runners()
        foreign = self.faults.foreign_load
        return GpuLoad(
            busy=max(self._busy.update(), foreign),
            warmth=max(self._warmth.update(), foreign),
            models=tuple((runner.model.name, self.vram_mib(runner.model)) for runner in self.runners.values()),
        )

    def _new_runner(self, model: ModelProfile, options: tuple[object, ...]) -> Runner:
        context = options[0] if isinstance(options[0], int) else default_context(model)
        slots = 1 if model.embedding else self.profile.slots
        expires_at = self.clock() + self.profile.keep_alive_s
        return Runner(model, options, asyncio.Semaphore(slots), expires_at, context_length=context)

    async def _acquire_runner(self, model: ModelProfile, options: dict[str, object]) -> Runner:
        """The model's runner, loaded if needed; its ``users`` is raised by one.

        One call at a time: while a model loads, all later requests wait, as in Ollama.
        """
        key = tuple(options.get(name) for name in RELOAD_OPTIONS)
        if key[0] == default_context(model):
            key = (None, *key[1:])
        async with self._scheduler:
            self.expire_runners()
            runner = self.runners.get(model.name)
            if runner is None or runner.reload_options != key:
                while (old := self.runners.get(model.name)) is not None and old.users:
                    await self._wait_released()
                self.runners.pop(model.name, None)
                await self._make_room(self.vram_mib(model))
                runner = self._new_runner(model, key)
                runner.loading = True
                self.runners[model.name] = runner
                try:
                    if self.profile.load_s > 0:
                        await asyncio.sleep(self.profile.load_s / model.speed)
                except asyncio.CancelledError:
                    del self.runners[model.name]
                    raise
                runner.loading = False
                self.loads += 1
            runner.users += 1
            runner.expires_at = math.inf
            return runner

    async def _make_room(self, need_mib: int) -> None:
        """Unloads models until the new one fits, the soonest to expire first. Waits while all models are in use."""
        total_mib = sum(gpu.memory_mib - IDLE_MIB for gpu in self.profile.gpus)
        while (
            self.runners and sum(self.vram_mib(runner.model) for runner in self.runners.values()) + need_mib > total_mib
        ):
            idle = [runner for runner in self.runners.values() if not runner.users]
            if idle:
                del self.runners[min(idle, key=lambda runner: runner.expires_at).model.name]
            else:
                await self._wait_released()

    async def _wait_released(self) -> None:
        self._released.clear()
        await self._released.wait()

    def _release_runner(self, runner: Runner, keep_alive: object) -> None:
        runner.users -= 1
        runner.expires_at = self.clock() + parse_keep_alive(keep_alive, self.profile.keep_alive_s)
        self.expire_runners()
        self._released.set()

    def _count_running(self, change: int) -> None:
        self.running += change
        self.max_running = max(self.max_running, self.running)
        self._busy.set_target(1.0 if self.running else 0.0)
        self._warmth.set_target(1.0 if self.running else 0.0)

    def _use_cache(self, runner: Runner, prompt: str) -> int:
        """How many tokens of the prompt's start are in the runner's cache. Adds the prompt to the cache."""
        if not self.profile.prefix_cache:
            return 0
        best = max((_common_prefix_length(prompt, recent) for recent in runner.prompts), default=0)
        runner.prompts[prompt] = None
        runner.prompts.move_to_end(prompt)
        while len(runner.prompts) > self.profile.slots:
            runner.prompts.popitem(last=False)
        return count_tokens(prompt[:best])


RELOAD_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
"""Options that need a new runner if their values differ from those of the loaded one."""

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(ns|us|µs|ms|s|m|h)")


def parse_keep_alive(keep_alive: object, default: float) -> float:
    """Seconds. A number is in seconds, a string is a Go duration; a negative one means for ever (``inf``). Raises
    ``ValueError`` for anything else."""
    if keep_alive is None:
        return default
    if isinstance(keep_alive, (int, float)) and not isinstance(keep_alive, bool):
        seconds = float(keep_alive)
    else:
        text = str(keep_alive).strip()
        sign, unsigned = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
        parts = list(_DURATION.finditer(unsigned))
        if unsigned == "0":
            return 0.0
        if not parts or "".join(part.group() for part in parts) != unsigned:
            raise ValueError(f"time: invalid duration {text!r}")
        seconds = sign * sum(float(part.group(1)) * _UNITS[part.group(2)] for part in parts)
    return math.inf if seconds < 0 else seconds


def _rate(tokens_per_s: float | None) -> float:
    """A rate of a profile; ``None`` means that it takes no time."""
    return math.inf if tokens_per_s is None else tokens_per_s


def default_context(model: ModelProfile) -> int:
    """Ollama's default context in tokens, with 23 GiB of GPU memory or more."""
    return min(model.context_length, 32768)


def hash_us(*parts: str) -> int:
    """Microseconds that depend only on these names: so each host stored its models at another time."""
    return zlib.crc32("/".join(parts).encode()) % 86_400_000_000


def _common_prefix_length(first: str, second: str) -> int:
    """The length of the common prefix. A binary search, because prompts may be long."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
