"""Conversations of several turns: each turn sends again what was said before it, with the real answers."""

from __future__ import annotations

from dataclasses import replace

from gpumesh.backends.base import ChatRequest, Message


class ConversationHistories:
    """What was said in each conversation of a stage, by the conversation's id. A request without an id has none."""

    def __init__(self) -> None:
        self._messages: dict[int, tuple[Message, ...]] = {}

    def __repr__(self) -> str:
        return f"<ConversationHistories {len(self._messages)}>"

    def continue_chat(self, conversation: int | None, chat: ChatRequest) -> ChatRequest:
        """The request of the next turn, with all that was said before in front of its own messages."""
        earlier = () if conversation is None else self._messages.get(conversation, ())
        return replace(chat, messages=(*earlier, *chat.messages)) if earlier else chat

    def add_answer(self, conversation: int | None, chat: ChatRequest, answer: str) -> None:
        """Adds a turn: the messages that were sent, and the answer. A turn without an answer is left out: a client
        whose request failed asks its next question as if this one had not been asked."""
        if conversation is not None and answer:
            self._messages[conversation] = (*chat.messages, Message("assistant", answer))
