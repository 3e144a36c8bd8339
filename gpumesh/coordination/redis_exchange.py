"""``RedisExchange``: the messages and facts of one gateway, as its steps tell them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from gpumesh.coordination.exchange import MAX_TEXT_CHARS, FactListener, MessageListener
from gpumesh.coordination.step_messages import DO_NOT_ASK, PublishedMessage, StepReply

MAX_PENDING = 1000  # messages that wait for the next step; with more, the oldest are lost


class RedisExchange:
    """The ``Exchange`` of the gateway ``gateway``. ``on_wanted`` is called when there is something to tell Redis."""

    def __init__(self, gateway: str, *, on_wanted: Callable[[], None]) -> None:
        self.gateway = gateway
        self.is_connected = False
        self._on_wanted = on_wanted
        self._messages: deque[tuple[str, str]] = deque(maxlen=MAX_PENDING)
        self._listeners: dict[str, list[MessageListener]] = {}
        self._own_facts: dict[str, str] = {}
        self._changed_topics: set[str] = set()  # of own facts, not told yet
        self._facts: dict[str, dict[str, str]] = {}  # topic -> gateway -> text
        self._facts_version = 0
        self._fact_listeners: list[FactListener] = []
        self._others: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<RedisExchange {self.gateway}, {len(self._others)} others, {len(self._messages)} messages wait>"

    # -- for this process ----------------------------------------------------------------------------------------

    def send(self, topic: str, text: str) -> None:
        _check_length(text)
        if self.is_connected:
            self._messages.append((topic, text))
            self._on_wanted()

    def listen(self, topic: str, on_message: MessageListener) -> None:
        self._listeners.setdefault(topic, []).append(on_message)

    def set_fact(self, topic: str, text: str | None) -> None:
        _check_length(text or "")
        if self._own_facts.get(topic) == text:
            return
        if text is None:
            del self._own_facts[topic]
        else:
            self._own_facts[topic] = text
        self._changed_topics.add(topic)  # the next heartbeat tells it

    def facts(self, topic: str) -> Mapping[str, str]:
        return self._facts.get(topic, {})

    def follow_facts(self, on_facts: FactListener) -> None:
        self._fact_listeners.append(on_facts)

    def other_gateways(self) -> frozenset[str]:
        return self._others

    # -- for the link --------------------------------------------------------------------------------------------

    @property
    def has_messages(self) -> bool:
        """Whether messages wait for the next step."""
        return bool(self._messages)

    def take_messages(self) -> list[tuple[str, str]]:
        """The messages that the next step sends. If that step is lost, they are lost."""
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def take_facts(self, *, is_heartbeat: bool) -> tuple[list[tuple[str, str]], int]:
        """The changed facts, and the version of the known facts of others, or ``DO_NOT_ASK``."""
        if not is_heartbeat:
            return [], DO_NOT_ASK
        facts = [(topic, self._own_facts.get(topic, "")) for topic in sorted(self._changed_topics)]
        self._changed_topics.clear()
        return facts, self._facts_version

    def apply(self, reply: StepReply) -> None:
        """Takes over what the answer to a step says of the others."""
        others, is_changed = frozenset(reply.gateways), False
        if others != self._others:
            self._others, is_changed = others, True
        if reply.facts_version not in (DO_NOT_ASK, self._facts_version):
            self._facts_version, is_changed = reply.facts_version, True
            self._facts = {}
            for gateway, topic, text in reply.facts:
                self._facts.setdefault(topic, {})[gateway] = text
        if is_changed:
            self._tell_listeners()

    def receive(self, message: PublishedMessage) -> None:
        """Takes a message of any gateway."""
        if message.gateway != self.gateway:
            for listener in self._listeners.get(message.topic, ()):
                listener(message.gateway, message.text)

    def start_joining(self) -> None:
        """Redis does not know this gateway: all of its facts are told again."""
        self.is_connected = True
        self._changed_topics = set(self._own_facts)
        self._facts_version = 0

    def go_alone(self) -> None:
        """The other gateways cannot be reached, and what is known of them is void."""
        self.is_connected = False
        self._messages.clear()
        if self._others or self._facts:
            self._others, self._facts = frozenset(), {}
            self._tell_listeners()

    def _tell_listeners(self) -> None:
        for listener in self._fact_listeners:
            listener()


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"longer than {MAX_TEXT_CHARS} characters")
