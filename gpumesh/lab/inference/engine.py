"""Simulates the inference of one host: load, wait for a slot, prefill, then one token after the other.

A stream that is alone on the host gets a token each ``1 / rate`` seconds. The time of each token is fixed when the
stream begins, so a late token does not delay the next ones (pacing.py). So Ollama's counters (``eval_count /
eval_duration``) show exactly the rate of the profile, and a client measures the same rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gpumesh.lab.inference.keep_alive import parse_keep_alive
from gpumesh.lab.inference.pacing import DecodeClock, Pacer
from gpumesh.lab.inference.prefixes import common_prefix_length
from gpumesh.lab.inference.runners import Runner, Runners
from gpumesh.lab.inference.slots import Slot
from gpumesh.lab.inference.usage import GpuLoad, UsageAverage
from gpumesh.lab.profile import Faults, HostProfile, ModelProfile
from gpumesh.lab.text import count_tokens
from gpumesh.text.model_names import full_name

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


@dataclass(slots=True, eq=False)
class SlotLease:
    """A request's use of one of a model's slots. The rates are those of a stream alone, in tokens/s.

    ``load_s`` is the time in seconds until the model was in memory: the wait for other loads, the wait for models that
    had to be unloaded, and the load itself. ``queued_s`` is the time in seconds that the request then waited for a
    slot. ``read_tokens`` are the tokens of its prompts that were not in the slot's cache.
    """

    runner: Runner
    rate: float
    prefill_rate: float
    load_s: float
    queued_s: float
    read_tokens: int = 0
    slot: Slot | None = None
    """``None`` until ``Engine.prefill``, which chooses the slot; always ``None`` on a host without a prefix cache."""
    decodes: bool = False
    """Whether its answer has begun, so that it counts as a stream of the host's decode clock."""


class Engine:
    """The inference of one host: its stored models, the models in memory (runners), and the slots.

    All calls must come from one event loop. ``faults`` may change at any time. ``store`` holds the model and the time
    when it was stored, by the model's name. ``running`` is the number of requests with a slot, ``max_running`` the
    largest such number.
    """

    def __init__(self, profile: HostProfile, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.profile = profile
        self.faults = Faults()
        self.clock = clock
        self.store: dict[str, tuple[ModelProfile, datetime]] = {}
        for number, model in enumerate(profile.models):  # each model is a day older than the model before it
            age = timedelta(days=number, microseconds=hash_us(profile.hostname, model.name))
            self.store[model.name] = (model, STORED_AT - age)
        self.running = 0
        self.max_running = 0
        self._runners = Runners(profile, clock=clock, vram_mib=self.vram_mib)
        self._decode_clock = DecodeClock(profile.share, clock=clock)
        self._prefill_turn = asyncio.Lock()  # held by the prompt that is read, if prompts stall the streams
        self._busy = UsageAverage(tau_s=0.3, clock=clock)  # follows the load almost at once
        self._heat = UsageAverage(tau_s=15.0, clock=clock)  # a card becomes warm and cold slowly

    @property
    def loads(self) -> int:
        """How many models were loaded since the start, those that were in memory at the start not counted."""
        return self._runners.loads

    def find_model(self, name: str) -> ModelProfile | None:
        """The stored model of this name, in any spelling that Ollama takes (``full_name``); ``None`` if there is
        none."""
        entry = self.store.get(name) or self.store.get(f"{name}:latest")
        if entry is None:
            wanted = full_name(name)
            entry = next((entry for stored, entry in self.store.items() if full_name(stored) == wanted), None)
        if entry is None:
            return None
        model, _stored_at = entry
        return model

    @asynccontextmanager
    async def lease_slot(
        self, model: ModelProfile, options: dict[str, object], keep_alive: object
    ) -> AsyncIterator[SlotLease]:
        """Loads the model if needed, waits for a slot, and yields the lease. First come, first served.

        ``options`` and ``keep_alive`` are those of the request. The slot is given back at the end of the context.
        """
        asked_at = self.clock()
        runner = await self._runners.acquire(model, options, keep_alive)
        try:
            loaded_at = self.clock()
            await runner.slots.acquire()
            speed = model.speed / self.faults.slow
            lease = SlotLease(
                runner,
                rate=_rate(self.profile.tokens_per_s) * speed,
                prefill_rate=_rate(self.profile.prefill_tokens_per_s) * speed,
                load_s=loaded_at - asked_at,
                queued_s=self.clock() - loaded_at,
            )
            self._count_running(+1)
            try:
                yield lease
            finally:
                if lease.decodes:
                    self._decode_clock.remove_stream()
                runner.slots.release(lease.slot)
                self._count_running(-1)
        finally:
            self._runners.release(runner)

    async def preload(self, model: ModelProfile, options: dict[str, object], keep_alive: object) -> None:
        """Does what an empty prompt asks for: loads the model, or unloads the model if ``keep_alive`` is 0."""
        if parse_keep_alive(keep_alive, self.profile.keep_alive_s) == 0:
            self._runners.unload(model.name)
            return
        runner = await self._runners.acquire(model, options, keep_alive)
        self._runners.release(runner)  # it stays in memory, and its keep_alive begins now

    async def prefill(self, lease: SlotLease, prompt: str) -> tuple[int, float]:
        """Chooses the slot, and waits for the time that prefill takes. Returns the prompt's tokens, and this time in s.

        Tokens in the slot's cache take no time, but are counted. If prompts stall the streams, the time includes the
        wait for the prompts before this one.
        """
        tokens = count_tokens(prompt)
        new_tokens = self._count_new_tokens(lease, prompt, tokens)
        lease.read_tokens += new_tokens
        seconds = new_tokens / lease.prefill_rate  # 0 for an infinite rate
        if seconds > 0:
            if self.profile.prefill_stalls:
                asked_at = self.clock()
                async with self._prefill_turn:
                    waited_s = self.clock() - asked_at
                    with self._stall_streams():
                        await asyncio.sleep(seconds)
                seconds += waited_s
            else:
                await asyncio.sleep(seconds)
        if lease.slot is not None:  # ``None``: the host has no prefix cache
            lease.slot.text = prompt
        return tokens, seconds

    def start_decoding(self, lease: SlotLease, total: int) -> Pacer:
        """Begins the ``total`` tokens of the answer, which from now on share the GPU with the other streams."""
        lease.decodes = True
        self._decode_clock.add_stream()
        return Pacer(total, lease.rate, self._decode_clock)

    def list_runners(self) -> list[Runner]:
        """The models in memory, and the models that load."""
        self._runners.expire()
        return list(self._runners.by_name.values())

    def vram_mib(self, model: ModelProfile) -> int:
        """The GPU memory that the model uses on this host when it is loaded, in MiB."""
        return 0 if self.faults.on_cpu else model.vram_mib

    def gpu_load(self) -> GpuLoad:
        """The load of the host's GPUs at this moment. It is at least ``Faults.foreign_load``, which other programs
        use."""
        foreign = self.faults.foreign_load
        return GpuLoad(
            busy=max(self._busy.update(), foreign),
            heat=max(self._heat.update(), foreign),
            models=tuple((runner.model.name, self.vram_mib(runner.model)) for runner in self.list_runners()),
        )

    def _count_new_tokens(self, lease: SlotLease, prompt: str, tokens: int) -> int:
        """Takes a slot, unless the lease has one, and returns how many of the prompt's tokens are not in its cache.

        At least 1, because the last token is always computed. The slot's cache keeps only the text that the prompt
        begins with. Without a prefix cache no slot is needed, and all tokens are new.
        """
        if not self.profile.prefix_cache:
            return max(1, tokens)
        if lease.slot is None:
            lease.slot, cached_length = lease.runner.slots.take_slot(prompt)
        else:  # another text of the same request
            cached_length = common_prefix_length(lease.slot.text, prompt)
        lease.slot.text = prompt[:cached_length]
        return max(1, tokens - count_tokens(prompt[:cached_length]))

    @contextlib.contextmanager
    def _stall_streams(self) -> Iterator[None]:
        """Lets no stream decode inside the context."""
        self._decode_clock.pause()
        try:
            yield
        finally:
            self._decode_clock.resume()

    def _count_running(self, change: int) -> None:
        """Adds ``change`` to the number of requests with a slot. The GPU is busy while there is such a request."""
        self.running += change
        self.max_running = max(self.max_running, self.running)
        target = 1.0 if self.running else 0.0
        self._busy.set_target(target)
        self._heat.set_target(target)


def record_output(lease: SlotLease, output: str) -> None:
    """Adds the answer to the text in the slot's cache: the next prompt of the conversation begins with both."""
    if lease.slot is not None:  # ``None``: the host has no prefix cache
        lease.slot.text += output


def _rate(tokens_per_s: float | None) -> float:
    """The rate in tokens/s as a number: ``None`` in a profile means that tokens take no time, an infinite rate."""
    return math.inf if tokens_per_s is None else tokens_per_s


def hash_us(*parts: str) -> int:
    """A number of microseconds, less than a day, made of these names alone: each host and model has its own number."""
    microseconds_per_day = 86_400_000_000
    return zlib.crc32("/".join(parts).encode()) % microseconds_per_day
