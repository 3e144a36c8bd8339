"""The models in memory of a simulated host, and the order in which requests load more, as in Ollama's ``sched.go``.

- A request for a model in memory that needs no reload runs at once, even while another model waits or loads, and even
  if this model is to be unloaded.
- All other requests are pending: one at a time, first come, first served, until its model is in memory.
- A pending request that finds no room picks a model to unload, and waits until no request uses that model.
- Requests for a model that loads wait until it is loaded.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from gpumesh.lab.inference.keep_alive import parse_keep_alive
from gpumesh.lab.inference.slots import SlotPool
from gpumesh.lab.profile import HostProfile, ModelProfile

IDLE_MIB = 4
"""The used memory of a 4090 on which no program runs."""

RELOAD_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
"""The options of a request that need a reload of the model if their values differ from those of the loaded model."""

MODELS_PER_GPU = 3
"""How many models Ollama keeps in memory for each GPU, unless it is told a number. They must fit in any case."""

MAX_FILL = 0.8
"""Ollama loads a model beside others only if it needs at most this share of the free memory."""


@dataclass(slots=True, eq=False)
class Runner:
    """A model that is in memory, or that is loading."""

    model: ModelProfile
    reload_options: tuple[object, ...]
    """The values of ``RELOAD_OPTIONS`` with which the model was loaded. Other values need a reload."""
    slots: SlotPool
    keep_alive_s: float
    """How long the model stays after its last use, in seconds: the value of the last request with a ``keep_alive``."""
    expires_at: float
    """The time on the engine's clock at which the model is unloaded; ``inf``: never, or not while it is in use."""
    context_length: int
    """In tokens."""
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the load has ended, or was given up."""
    users: int = 0
    """The number of requests that hold a slot or wait for a slot."""


class Runners:
    """The models in memory of one host. ``loads`` counts the loads. ``vram_mib`` gives the memory that a model needs.

    All calls must come from one event loop.
    """

    def __init__(
        self, profile: HostProfile, *, clock: Callable[[], float], vram_mib: Callable[[ModelProfile], int]
    ) -> None:
        self.by_name: dict[str, Runner] = {}  # by the name of the model
        self.loads = 0
        self._profile = profile
        self._clock = clock
        self._vram_mib = vram_mib
        self._pending_turn = asyncio.Lock()  # held by the pending request whose turn it is
        self._unloads = 0  # how many there have been
        self._changed = asyncio.Event()  # set when a model was unloaded, or has no users any more
        for model in profile.models:
            if model.resident:
                self.by_name[model.name] = self._new_runner(model, _read_reload_options({}, model, profile))
                self.by_name[model.name].loaded.set()

    async def acquire(self, model: ModelProfile, options: Mapping[str, object], keep_alive: object) -> Runner:
        """Returns the model's runner, and loads it first if needed. The caller counts as a user until ``release``."""
        wanted = _read_reload_options(options, model, self._profile)
        self.expire()
        runner = self.by_name.get(model.name)
        if runner is not None:
            await runner.loaded.wait()
            if self._can_serve(runner, wanted):
                return self._use(runner, keep_alive)
        async with self._pending_turn:
            await self._make_room(model, wanted)
            runner = self.by_name.get(model.name) or await self._load(model, wanted)
            return self._use(runner, keep_alive)

    def release(self, runner: Runner) -> None:
        """Ends one request's use of the runner."""
        runner.users -= 1
        if not runner.users:
            runner.expires_at = self._clock() + runner.keep_alive_s
            self._changed.set()
            self.expire()

    def unload(self, name: str) -> None:
        """Unloads the model of this name as soon as no request uses it."""
        runner = self.by_name.get(name)
        if runner is not None:
            self._unload_when_unused(runner)

    def expire(self) -> None:
        """Unloads the models whose time has passed, unless they are in use or still load."""
        now = self._clock()
        for runner in list(self.by_name.values()):
            if not runner.users and runner.loaded.is_set() and runner.expires_at <= now:
                self._remove(runner)

    def _can_serve(self, runner: Runner, wanted: tuple[object, ...]) -> bool:
        """Whether the runner is still in memory, and has these values of ``RELOAD_OPTIONS``."""
        return self.by_name.get(runner.model.name) is runner and runner.reload_options == wanted

    def _use(self, runner: Runner, keep_alive: object) -> Runner:
        """Adds a user. A request without ``keep_alive`` leaves the time as it is, as in Ollama."""
        runner.users += 1
        runner.expires_at = math.inf
        if keep_alive is not None:
            runner.keep_alive_s = parse_keep_alive(keep_alive, self._profile.keep_alive_s)
        return runner

    async def _make_room(self, model: ModelProfile, wanted: tuple[object, ...]) -> None:
        """Unloads models until this model is in memory with the wanted options, or can be loaded.

        A model in use is unloaded only when no request uses it any more: the caller waits for this.
        """
        while True:
            self.expire()
            runner = self.by_name.get(model.name)
            if runner is not None and self._can_serve(runner, wanted):
                return
            if runner is None and self._has_room(model):
                return
            # If the model itself is in memory with other options, that runner must go. Otherwise any runner must go, to
            # make room.
            await self._wait_unloaded(runner or self._choose_to_unload())

    def _has_room(self, model: ModelProfile) -> bool:
        """Whether the model can be loaded beside the others. A model of any size can be loaded into an empty memory."""
        if not self.by_name:
            return True
        max_loaded = self._profile.max_loaded or MODELS_PER_GPU * max(1, len(self._profile.gpus))
        total_mib = sum(gpu.memory_mib - IDLE_MIB for gpu in self._profile.gpus)
        free_mib = total_mib - sum(self._vram_mib(runner.model) for runner in self.by_name.values())
        return len(self.by_name) < max_loaded and self._vram_mib(model) <= MAX_FILL * free_mib

    def _choose_to_unload(self) -> Runner:
        """The unused model with the shortest ``keep_alive``; if all are used, the used model with the shortest."""
        return min(self.by_name.values(), key=lambda runner: (runner.users > 0, *_unload_rank(runner)))

    async def _wait_unloaded(self, runner: Runner) -> None:
        """Unloads the runner as soon as no request uses it. Waits for this, or until another model was unloaded.

        Requests for this model that come during the wait still run, and make the wait longer. If such a request has a
        ``keep_alive``, the model even stays until this time has passed, as in Ollama.
        """
        unloads_before = self._unloads
        self._unload_when_unused(runner)
        while self._unloads == unloads_before:
            self._changed.clear()
            next_expiry = min((other.expires_at for other in self.by_name.values()), default=math.inf)
            wait_s = None if math.isinf(next_expiry) else max(0.0, next_expiry - self._clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            self.expire()

    def _unload_when_unused(self, runner: Runner) -> None:
        runner.keep_alive_s = 0.0  # for a model in use: ``release`` of its last user then unloads it
        if not runner.users and runner.loaded.is_set():
            self._remove(runner)

    def _remove(self, runner: Runner) -> None:
        del self.by_name[runner.model.name]
        self._unloads += 1
        self._changed.set()

    async def _load(self, model: ModelProfile, reload_options: tuple[object, ...]) -> Runner:
        """Loads the model, and returns its runner. If the client goes, its load is given up (CancelledError)."""
        runner = self._new_runner(model, reload_options)
        self.by_name[model.name] = runner
        try:
            if self._profile.load_s > 0:
                await asyncio.sleep(self._profile.load_s / model.speed)
            self.loads += 1
        except asyncio.CancelledError:
            self._remove(runner)
            raise
        finally:
            runner.loaded.set()
        return runner

    def _new_runner(self, model: ModelProfile, reload_options: tuple[object, ...]) -> Runner:
        """Makes a runner that was loaded with these values of ``RELOAD_OPTIONS``. Its ``loaded`` is not set yet."""
        num_ctx = reload_options[RELOAD_OPTIONS.index("num_ctx")]
        context_length = num_ctx if isinstance(num_ctx, int) else default_context(model, self._profile)
        slots = 1 if model.embedding else self._profile.slots  # as in Ollama
        keep_alive_s = self._profile.keep_alive_s
        return Runner(
            model,
            reload_options,
            SlotPool(slots, shared_cache=self._profile.shared_cache, lost_tokens=self._profile.lost_tokens),
            keep_alive_s,
            expires_at=self._clock() + keep_alive_s,
            context_length=context_length,
        )


def default_context(model: ModelProfile, profile: HostProfile) -> int:
    """The context in tokens of a request without ``num_ctx``."""
    return min(model.context_length, profile.context)


def _read_reload_options(
    options: Mapping[str, object], model: ModelProfile, profile: HostProfile
) -> tuple[object, ...]:
    """The request's values of ``RELOAD_OPTIONS``, in this order; ``None``: the default.

    A value that means the same as the default becomes ``None`` too, because it needs no reload. A ``num_ctx`` is moved
    into the range from 4 to the context that the model was trained with.
    """
    values = {name: options.get(name) for name in RELOAD_OPTIONS}
    num_ctx, num_gpu = values["num_ctx"], values["num_gpu"]
    if isinstance(num_ctx, int):
        context = min(max(num_ctx, 4), model.context_length)
        values["num_ctx"] = None if context == default_context(model, profile) else context
    if isinstance(num_gpu, int) and num_gpu < 0:  # as many layers on the GPU as fit: the default
        values["num_gpu"] = None
    return tuple(values.values())


def _unload_rank(runner: Runner) -> tuple[float, str]:
    """Ollama's order of models to unload: by ``keep_alive``, then by the name of the model's file."""
    return runner.keep_alive_s, runner.model.digest
