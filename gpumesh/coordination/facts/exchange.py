"""``FactsExchange``: sends this gateway's facts to the others, and hands theirs to the mesh.

Sending never waits: a message that cannot be sent is lost. So what must arrive is sent again: a presence each second, a
question every few minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

from gpumesh import __version__
from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.prefixes import PromptPrint
from gpumesh.coordination.facts import messages
from gpumesh.coordination.facts.messages import (
    LearnedFigures,
    LearnedQuestion,
    PlacedPrompts,
    Presence,
    ServerChange,
)
from gpumesh.coordination.facts.other_gateways import OtherGateways
from gpumesh.coordination.facts.prompts import PromptTeller, hash_secret, read_prompt
from gpumesh.text.printable import printable

HEARTBEAT_S = 1.0  # less than a third of ``other_gateways.SILENT_S``
MIN_INTERVAL_S = 0.1  # between two presences, however much happens
CHECK_INTERVAL_S = 1.0  # between two checks of one server that others ask for
ASK_INTERVAL_S = 300.0  # between two questions about the same servers
MAX_ANSWERS = 4  # to questions, in one turn of ``tick``
MAX_ASKED = 2 * messages.MAX_SERVERS  # servers that others ask about, and whose turn has not come
TIME_TOLERANCE_S = 1.0  # figures that are newer by less are the same figures


class FactsChannel(Protocol):
    """Carries messages to all gateways of the mesh that listen now."""

    @property
    def is_connected(self) -> bool: ...

    def send(self, text: str) -> None:
        """Sends the message in a moment, without waiting. While the channel is not connected, drops it."""


class OwnLoad(NamedTuple):
    """The requests of this gateway. ``drained``: the servers of the nodes that a person has drained here."""

    in_flight: int
    queued: int
    drained: Collection[str]


class MeshFacts(Protocol):
    """The mesh of this gateway, as the exchange asks it and tells it."""

    def own_load(self) -> OwnLoad: ...

    def note_gateways(self) -> None:
        """A gateway has begun or ended, or has drained other servers than before."""

    def check_server(self, server: str, *, is_up: bool) -> None:
        """The server has failed at another gateway, or answers there again."""

    def learned_times(self) -> Mapping[str, float]:
        """The servers that this gateway knows, and the time of what it has learned about each of them, in seconds since
        1970; 0 if it has learned nothing."""

    def note_prompt(self, server: str, key: ResidencyKey, prompt: PromptPrint) -> None:
        """Another gateway has sent the prompt to the server. Its hashes were made with the secret of this gateway."""

    def note_prompt_secret(self, secret: bytes) -> None:
        """From now on all gateways make their hashes of prompts with this secret."""

    def find_learned(self, server: str) -> LearnedFigures | None:
        """What this gateway has learned about the server; ``None`` if it has learned nothing, or has no such server."""

    def take_learned(self, figures: LearnedFigures) -> None:
        """Takes over what another gateway has learned, if this gateway has such a server and no newer figures."""


class FactsExchange:
    """Exchanges facts with the other gateways while ``run`` runs. ``clock`` returns monotonic seconds, ``wall_clock``
    seconds since 1970. ``host`` is this machine's name. Hashes of prompts are made with ``prompt_secret`` until an
    older gateway is heard."""

    def __init__(
        self,
        channel: FactsChannel,
        mesh: MeshFacts,
        *,
        gateway_id: str,
        host: str,
        prompt_secret: bytes,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.others = OtherGateways()
        self.prompts = PromptTeller(prompt_secret)
        self._channel = channel
        self._mesh = mesh
        self._id = gateway_id
        self._host = printable(host, messages.MAX_TEXT_CHARS)
        self._clock = clock
        self._since = wall_clock()
        self._is_wanted = asyncio.Event()  # something is due
        self._next_presence_at = clock()
        self._checked_at: dict[tuple[str, bool], float] = {}  # when a server was checked because it failed, or is up
        self._asked: dict[str, float] = {}  # what others ask: by server, the time of the figures that they have
        self._question_sent_at: float | None = None  # ``None``: the question is sent in the next turn of ``tick``

    def __repr__(self) -> str:
        return f"<FactsExchange of {self._host}, {self.others!r}>"

    # -- what this gateway tells -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Sends what is due, until it is cancelled."""
        while True:
            self._is_wanted.clear()
            self.tick()
            await asyncio.sleep(MIN_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self._next_presence_at - self._clock(), 0.0)):
                    await self._is_wanted.wait()

    def tick(self) -> None:
        """Sends what is due now, and forgets the gateways that are silent."""
        now = self._clock()
        self.others.note_connection(is_up=self._channel.is_connected, now=now)
        for prompts in self.prompts.take_messages():
            self._send(prompts)
        if now < self._next_presence_at:
            return
        self._next_presence_at = now + HEARTBEAT_S
        if self.others.forget_silent(now):
            self._mesh.note_gateways()
        self._send(self.own_presence())
        self._ask_learned(now)
        self._answer_questions()

    def send_presence(self) -> None:
        """Sends the presence in a moment, because something in it has changed."""
        self._next_presence_at = self._clock()
        self._is_wanted.set()

    def own_presence(self) -> Presence:
        load = self._mesh.own_load()
        drained = tuple(sorted(load.drained))[: messages.MAX_SERVERS]
        secret = self.prompts.secret.hex()
        return Presence(self._host, os.getpid(), __version__, self._since, load.in_flight, load.queued, drained, secret)

    def tell_server_change(self, server: str, *, is_up: bool) -> None:
        """Tells the others that the server has just failed here, or answers again."""
        self._send(ServerChange(server, is_up))

    def tell_prompt(self, server: str, key: ResidencyKey, prompt: PromptPrint) -> None:
        """Tells the others in a moment that this prompt was sent to the server. Costs nothing while there are none."""
        if self.others.is_any_heard and self.prompts.add(server, key, prompt):
            self._is_wanted.set()

    def note_new_server(self) -> None:
        """This gateway knows another server: the others are asked what they have learned about it."""
        self._question_sent_at = None

    def _ask_learned(self, now: float) -> None:
        """Asks the others for what they have learned, if it is time."""
        is_due = self._question_sent_at is None or now - self._question_sent_at >= ASK_INTERVAL_S
        if not is_due or not self._channel.is_connected or not self.others.presences():
            return
        servers = dict(list(self._mesh.learned_times().items())[: messages.MAX_SERVERS])
        if servers:
            self._question_sent_at = now
            self._send(LearnedQuestion(servers))

    def _answer_questions(self) -> None:
        """Answers a few of the questions of others. The ``tick`` of each gateway comes at another time, so the first
        answer usually comes before the other gateways answer, and these then keep silent (``_take_figures``)."""
        for server in list(self._asked)[:MAX_ANSWERS]:
            newer_than = self._asked.pop(server)
            figures = self._mesh.find_learned(server)
            if figures is None or figures.learned_at <= newer_than + TIME_TOLERANCE_S:
                continue
            if len(figures.rates) + len(figures.limits) <= messages.MAX_LEARNED_BYTES:
                self._send(figures)

    def _send(self, message: messages.Message) -> None:
        if self._channel.is_connected:
            self._channel.send(messages.encode(message))

    # -- what others tell ------------------------------------------------------------------------------------------

    def receive(self, gateway: str, text: str) -> None:
        """Takes a message of another gateway. A message that cannot be read is ignored."""
        try:
            message = messages.decode(text)
        except ValueError:
            return
        match message:
            case Presence():
                self._take_presence(gateway, message)
            case ServerChange():
                self._take_server_change(message)
            case LearnedQuestion():
                self._take_question(message)
            case LearnedFigures():
                self._take_figures(message)
            case PlacedPrompts():
                self._take_prompts(message)

    def note_gone(self, gateway: str) -> None:
        """The gateway has ended, and said so to Redis."""
        if self.others.forget(gateway):
            self._mesh.note_gateways()

    def _take_presence(self, gateway: str, presence: Presence) -> None:
        is_new = not self.others.knows(gateway)
        if self.others.receive(gateway, presence, self._clock()):
            self._mesh.note_gateways()
        self._follow_secret()
        if is_new:
            self.send_presence()  # so that a gateway that has just begun need not wait to know this one

    def _take_prompts(self, message: PlacedPrompts) -> None:
        if message.prompt_secret == hash_secret(self.prompts.secret):
            for prompt in message.prompts:
                known = read_prompt(prompt)
                if known is not None:
                    self._mesh.note_prompt(prompt.server, *known)

    def _follow_secret(self) -> None:
        """Takes over the secret of the gateway that began first, if that is not this one."""
        eldest = min(self.others.presences().items(), key=lambda item: (item[1].since, item[0]), default=None)
        if eldest is None:
            return
        gateway, presence = eldest
        secret = presence.prompt_secret
        if secret is None or (self._since, self._id) < (presence.since, gateway) or secret == self.prompts.secret.hex():
            return
        self.prompts.replace_secret(bytes.fromhex(secret))
        self._mesh.note_prompt_secret(self.prompts.secret)

    def _take_server_change(self, change: ServerChange) -> None:
        now, key = self._clock(), (change.server, change.is_up)
        checked_at = self._checked_at.get(key)
        if checked_at is not None and now - checked_at < CHECK_INTERVAL_S:
            return
        if len(self._checked_at) >= messages.MAX_SERVERS:
            self._checked_at.clear()
        self._checked_at[key] = now
        self._mesh.check_server(change.server, is_up=change.is_up)

    def _take_question(self, question: LearnedQuestion) -> None:
        for server, newer_than in question.servers.items():
            if len(self._asked) >= MAX_ASKED:
                return
            self._asked[server] = min(newer_than, self._asked.get(server, newer_than))

    def _take_figures(self, figures: LearnedFigures) -> None:
        if figures.server in self._asked:
            # Another gateway has answered. This gateway answers too only if it has newer figures.
            self._asked[figures.server] = max(figures.learned_at, self._asked[figures.server])
        self._mesh.take_learned(figures)
