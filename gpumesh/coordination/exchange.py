"""``Exchange``: the interface through which gateways tell each other what is no place: messages and facts.

A **message** goes once to all gateways that listen now. A **fact** is kept for as long as its gateway lives, and a
gateway that comes later reads it too. Texts of other gateways are hostile until parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

MAX_TEXT_CHARS = 64_000  # of a message or a fact; a longer text is not sent

MessageListener = Callable[[str, str], None]
"""Called with the id of the gateway that has sent a message, and the message's text."""
FactListener = Callable[[], None]


class Exchange(Protocol):
    """Nothing here waits, and nothing raises an error that another gateway or Redis causes."""

    @property
    def gateway(self) -> str:
        """The id of this gateway among the others: new for each process."""

    @property
    def is_connected(self) -> bool:
        """Whether the other gateways can be reached now."""

    def send(self, topic: str, text: str) -> None:
        """Sends a message to all other gateways. While they cannot be reached it is lost. Raises ValueError if the text
        is longer than ``MAX_TEXT_CHARS``."""

    def listen(self, topic: str, on_message: MessageListener) -> None:
        """Calls ``on_message`` for each message of other gateways on this topic."""

    def set_fact(self, topic: str, text: str | None) -> None:
        """Sets this gateway's fact on this topic; ``None``: removes it. Others see it within about a second. It is sent
        again after a loss of the connection. Raises ValueError if the text is longer than ``MAX_TEXT_CHARS``."""

    def facts(self, topic: str) -> Mapping[str, str]:
        """The facts of the other gateways on this topic, by gateway, about a second old at most. Empty while they
        cannot be reached."""

    def follow_facts(self, on_facts: FactListener) -> None:
        """Calls ``on_facts`` when a fact of another gateway has changed, or a gateway has come or gone."""

    def other_gateways(self) -> frozenset[str]:
        """The ids of the other gateways of the mesh that live. Empty while they cannot be reached."""


class NoExchange:
    """The exchange of a gateway without others."""

    gateway = "single"
    is_connected = False

    def __repr__(self) -> str:
        return "<NoExchange>"

    def send(self, topic: str, text: str) -> None:
        pass

    def listen(self, topic: str, on_message: MessageListener) -> None:
        pass

    def set_fact(self, topic: str, text: str | None) -> None:
        pass

    def facts(self, topic: str) -> Mapping[str, str]:  # noqa: ARG002
        return {}

    def follow_facts(self, on_facts: FactListener) -> None:
        pass

    def other_gateways(self) -> frozenset[str]:
        return frozenset()
