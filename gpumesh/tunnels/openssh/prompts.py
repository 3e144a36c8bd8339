"""Answers what ``ssh`` asks through askpass.py: from the node's secrets, else by a person, else not at all."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from gpumesh.printable import printable
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.transport import ANSWER_TIMEOUT_S, ConnectionEvents

_PASSPHRASE = re.compile(r"passphrase for", re.IGNORECASE)
_PASSWORD = re.compile(r"password", re.IGNORECASE)
_TRUST = re.compile(r"\(yes/no|authenticity of host|fingerprint", re.IGNORECASE)
_TOUCH = re.compile(r"confirm user presence", re.IGNORECASE)
_QUESTION_LIMIT = 8192


class AskpassServer:
    """``async with Prompts(…) as prompts``: listens in ``folder`` (0700) for as long as a login takes.

    Each secret is given once for each question: asked again, it was wrong, and giving it again would lock accounts.
    Whether to trust a host key is never answered here: that is what ``gpumesh trust`` is for.
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
        self._path = folder / "ask"
        self._secrets = secrets
        self._events = events
        self._deadline = deadline
        self._interactive = interactive
        self._given: set[str] = set()
        self._server: asyncio.Server | None = None
        self.askpass_path = folder / "askpass"

    @property
    def can_answer(self) -> bool:
        return self._interactive or bool(self._secrets)

    def forget_given_secrets(self) -> None:
        """Another login, after one that succeeded: what was given was right."""
        self._given.clear()

    async def __aenter__(self) -> AskpassServer:
        if self.can_answer:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_QUESTION_LIMIT)
            self._path.chmod(0o600)
            command = [sys.executable, "-P", "-m", "gpumesh.tunnels.openssh.askpass", str(self._path)]
            self.askpass_path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$1"\n')
            self.askpass_path.chmod(0o700)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
            self.askpass_path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = json.loads(await reader.readline())
            answer = await self.answer_question(question) if isinstance(question, str) else None
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError):
            pass  # ssh has given the question up
        finally:
            writer.close()

    async def answer_question(self, question: str) -> str | None:
        """``None``: nobody answers."""
        if _TRUST.search(question):
            return None
        if _TOUCH.search(question):
            with self._deadline.paused(ANSWER_TIMEOUT_S):
                await asyncio.sleep(ANSWER_TIMEOUT_S)  # ssh ends us when the key was touched
            return None
        name = "passphrase" if _PASSPHRASE.search(question) else "password" if _PASSWORD.search(question) else ""
        if name in self._secrets and question not in self._given:
            self._given.add(question)
            return self._secrets[name]
        if not self._interactive:
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            return await self._events.ask_person(printable(question), echo=False)
