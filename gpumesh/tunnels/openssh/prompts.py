"""Answers the questions that ``ssh`` asks in a login (through askpass.py), with our secrets or by asking a person."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from gpumesh.text.printable import printable
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.transport import ANSWER_TIMEOUT_S, ConnectionEvents

_PASSPHRASE = re.compile(r"passphrase for", re.IGNORECASE)
_PASSWORD = re.compile(r"password", re.IGNORECASE)
_TRUST_QUESTION = re.compile(r"\(yes/no|authenticity of host|fingerprint", re.IGNORECASE)
_TOUCH_REQUEST = re.compile(r"confirm user presence", re.IGNORECASE)
_QUESTION_LIMIT = 8192  # bytes


class AskpassServer:
    """``async with AskpassServer(…) as prompts``: answers ssh's questions at a Unix socket in ``folder`` (0700).

    ``askpass_path`` is the program for ssh's ``SSH_ASKPASS``; it exists only if ``can_answer``. A secret answers the
    same question only once. If ssh asks again, the secret was wrong, and another try could lock the account. Questions
    whether to trust a host key get no answer here: ``gpumesh trust`` is for that.
    """

    def __init__(
        self,
        folder: Path,
        secrets: Mapping[str, str],
        events: ConnectionEvents,
        deadline: Deadline,
        *,
        interactive: bool,
    ) -> None:
        self._socket_path = folder / "ask"
        self._secrets = secrets
        self._events = events
        self._deadline = deadline
        self._interactive = interactive
        self._answered_questions: set[str] = set()  # the questions that one of our secrets has answered
        self._server: asyncio.Server | None = None
        self.askpass_path = folder / "askpass"

    @property
    def can_answer(self) -> bool:
        """Whether there is a secret or a person that may answer. Without both, ssh must not ask (BatchMode)."""
        return self._interactive or bool(self._secrets)

    def forget_given_secrets(self) -> None:
        """Allows each secret to be given once more, after a login that succeeded: that login showed that the secrets
        are right."""
        self._answered_questions.clear()

    async def __aenter__(self) -> AskpassServer:
        if self.can_answer:
            self._server = await asyncio.start_unix_server(self._serve, self._socket_path, limit=_QUESTION_LIMIT)
            self._socket_path.chmod(0o600)
            # -P: so that a file in the current folder is not imported as a module.
            command = [sys.executable, "-P", "-m", "gpumesh.tunnels.openssh.askpass", str(self._socket_path)]
            self.askpass_path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$1" 2>/dev/null\n')
            self.askpass_path.chmod(0o700)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            self._socket_path.unlink(missing_ok=True)
            self.askpass_path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the one question of an askpass process: a line of JSON each way."""
        try:
            question = json.loads(await reader.readline())
            answer = await self.answer_question(question) if isinstance(question, str) else None
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError):
            pass  # askpass has ended, or did not send a line of JSON: then ssh does not wait for an answer
        finally:
            writer.close()

    async def answer_question(self, question: str) -> str | None:
        """Returns the answer to a question of ssh: a secret of ours, or a person's text; ``None``: no answer."""
        if _TRUST_QUESTION.search(question):  # ``gpumesh trust`` is for that
            return None
        if _TOUCH_REQUEST.search(question):
            with self._deadline.paused(ANSWER_TIMEOUT_S):
                await asyncio.sleep(ANSWER_TIMEOUT_S)  # ssh itself ends askpass when the key was touched
            return None
        secret = self._secrets.get(_find_secret_name(question))
        if secret is not None and question not in self._answered_questions:
            self._answered_questions.add(question)
            return secret
        if not self._interactive:  # no person is there
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            # Not echoed: most questions of ssh are for a password, a passphrase or a code.
            return await self._events.ask_person(printable(question), echo=False)


def _find_secret_name(question: str) -> str:
    """The name of the secret that ssh asks for: ``passphrase``, ``password``, or "" for another question."""
    if _PASSPHRASE.search(question):  # first, because the key's path in such a question may contain "password"
        return "passphrase"
    return "password" if _PASSWORD.search(question) else ""
