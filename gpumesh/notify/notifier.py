"""``run_notifier`` watches the mesh, and sends what is worth telling by each rule of ``notify`` in mesh.yaml."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime

from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.wakeup import Wakeup
from gpumesh.notify.events import EventFinder, MeshEvent
from gpumesh.notify.messages import Message
from gpumesh.notify.outbox import Outbox
from gpumesh.notify.senders import send_until_done
from gpumesh.state import MeshState
from gpumesh.topology import NotifySpec

log = logging.getLogger(__name__)


async def run_notifier(
    rules: Callable[[], Sequence[NotifySpec]], states: AsyncIterator[MeshState], *, clock: Callable[[], float]
) -> None:
    """Sends the events of these states by all rules, until it is cancelled. ``rules`` returns the rules of now, which
    may change with mesh.yaml. ``clock`` returns monotonic seconds."""
    watcher = _Watcher(clock)
    sending: dict[NotifySpec, asyncio.Task[None]] = {}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watcher.run(), name="notify")
        async for state in states:
            current = dict.fromkeys(rules())  # two equal rules would send each message twice
            for rule in sending.keys() - current:
                watcher.receivers.pop(rule)
                sending.pop(rule).cancel()
            for rule in current:
                if rule not in sending:
                    watcher.receivers[rule] = receiver = _Receiver(rule, clock)
                    sending[rule] = tasks.create_task(receiver.run(), name="notify")
            watcher.take(state)


async def _wait(wakeup: Wakeup, timeout_s: float | None) -> None:
    """Waits until somebody wakes this task, or for ``timeout_s``; ``None``: however long that takes."""
    try:
        async with asyncio.timeout(timeout_s):
            await wakeup.wait()
    except TimeoutError:
        pass


class _Watcher:
    """Finds the events in the states, also those that time alone makes, and gives them to the receivers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.receivers: dict[NotifySpec, _Receiver] = {}  # by its rule in mesh.yaml
        self._clock = clock
        self._finder = EventFinder()
        self._state: MeshState | None = None
        self._changed = Wakeup()

    def take(self, state: MeshState) -> None:
        self._state = state
        self._changed.wake()

    async def run(self) -> None:
        """Gives each event of the mesh's states to all receivers, until cancelled."""
        while True:
            timeout_s = None
            if self._state is not None:
                now = self._clock()
                mesh = self._state.mesh
                for event in self._finder.find(self._state, now):
                    for receiver in self.receivers.values():
                        receiver.add(mesh, event)
                timeout_s = self._finder.next_change_s(now)
            await _wait(self._changed, timeout_s)


class _Receiver:
    """Sends the events of one rule, one message after another."""

    def __init__(self, rule: NotifySpec, clock: Callable[[], float]) -> None:
        self._mesh = ""
        self._rule = rule
        self._clock = clock
        self._outbox = Outbox(rule.quiet_s)
        self._added = Wakeup()  # wakes ``run``
        self._is_failing = False  # the last message could not be sent

    def add(self, mesh: str, event: MeshEvent) -> None:
        """Adds an event of the mesh of this name, if the rule wants events of this kind."""
        if event.kind in self._rule.on:
            self._mesh = mesh
            self._outbox.add(event)
            self._added.wake()

    async def run(self) -> None:
        """Sends the events that are due, until cancelled."""
        while True:
            now = self._clock()
            due = self._outbox.take_due(now)
            if due:
                await self._send(Message(self._mesh, datetime.now(UTC), due))
            else:
                await _wait(self._added, self._outbox.next_due_s(now))

    async def _send(self, message: Message) -> None:
        """Sends one message. The first of several failures is logged."""
        try:
            await send_until_done(self._rule, message)
        except GPUMeshError as error:
            if not self._is_failing:
                reason = f"{self._rule.receiver}: {error.message}"
                log.warning("a message could not be sent to %s", reason, extra={"event": "notify-failed"})
            self._is_failing = True
        except Exception:  # a bug of ours must not end the other rules
            log.exception("a message could not be sent", extra={"event": "notify-failed"})
        else:
            self._is_failing = False
            log.info("told %s: %s", self._rule.receiver, message.title, extra={"event": "notify"})
