"""Answers the questions that a host asks in a keyboard-interactive login: with our password, or by asking a person."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paramiko

from gpumesh.text.printable import printable

AskPerson = Callable[[str, bool], str | None]
"""Asks a person and blocks until the answer; ``None``: no answer. Arguments: the text; whether to show the answer."""

MAX_QUESTIONS = 10  # a host may ask this many questions in one login


class QuestionAnswerer:
    """Answers the host's questions in one keyboard-interactive login.

    The first question for a password whose answer must not be shown gets ``password``. All other questions go to
    ``ask``; so does a second question for a password, because then ours was refused or another is meant.
    ``notices`` are the texts that came without a question.
    """

    def __init__(self, password: str | None, ask: AskPerson) -> None:
        self._unused_password = password
        self._ask = ask
        self._question_count = 0
        self.notices: list[str | bytes] = []

    def answer(self, title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
        """Called by paramiko with one group of questions. ``prompts`` has each question, and whether to show its
        answer."""
        heading = printable(" ".join(part for part in (title, instructions) if part))
        if heading and not prompts:
            self.notices.append(heading)
        return [self._answer_question(heading, question, echo) for question, echo in prompts]

    def _answer_question(self, heading: str, question: str, echo: bool) -> str:
        """The answer to one question; "" when no person answers. Raises AuthenticationException after too many."""
        self._question_count += 1
        if self._question_count > MAX_QUESTIONS:
            raise paramiko.AuthenticationException("too many questions")
        asks_for_password = not echo and "assw" in question  # "Password:" or "password for …"
        if asks_for_password and self._unused_password is not None:
            password = self._unused_password
            self._unused_password = None
            return password
        return self._ask(f"{heading} {printable(question)}".strip(), echo) or ""
