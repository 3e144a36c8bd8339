"""Who we are, to an SSH host: key files, the agent, a password, questions to a person; in this order. Blocking.

All attempts are made on one connection. Where all fail, the error names what was tried and what the host would take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import paramiko

from gpumesh.errors import AuthRefused, ConnectTimeout, KeyUnreadable, TunnelError, TunnelLost
from gpumesh.printable import printable
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.transport import ANSWER_TIMEOUT_S

AskPerson = Callable[[str, bool], str | None]
"""Asks a person: the text, and whether the answer may be shown. Blocks; ``None``: nobody answers."""

AGENT_KEYS = 5  # sshd gives up after six failures (MaxAuthTries)
MAX_QUESTIONS = 10  # of a host that keeps on asking


@dataclass(frozen=True, slots=True)
class Credentials:
    """What may be tried. ``password`` and ``passphrase`` are secrets: no ``repr``."""

    user: str
    identity_files: tuple[Path, ...] = ()
    agent: bool = True
    password: str | None = None
    passphrase: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, identity_files={self.identity_files!r}, agent={self.agent})"


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """A private key of a kind that paramiko has, with its certificate if one lies beside. Raises ``KeyUnreadable``."""
    needs_passphrase = False
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            key = kind.from_private_key_file(str(path.expanduser()), passphrase)
            certificate = path.expanduser().with_name(path.name + "-cert.pub")
            if certificate.exists():
                key.load_certificate(str(certificate))
            return key
        except FileNotFoundError as error:
            raise KeyUnreadable(f"there is no key file {path}", hint="check `ssh.identity_file`") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise KeyUnreadable(f"key file {path} cannot be read: {reason}", hint="check its owner and mode") from error
        except paramiko.PasswordRequiredException:
            needs_passphrase = True
        except (paramiko.SSHException, ValueError, TypeError):
            continue  # another kind of key, or a wrong passphrase: both look the same
    if needs_passphrase:
        raise KeyUnreadable(
            f"key file {path} needs a passphrase",
            hint="name its variable in `ssh.passphrase_env`, or add the key to your agent (`ssh-add`)",
        )
    if passphrase is not None:
        raise KeyUnreadable(
            f"key file {path} does not open with the passphrase given",
            hint="check the variable that `ssh.passphrase_env` names",
        )
    raise KeyUnreadable(
        f"key file {path} is not a private key that can be used",
        hint="for a FIDO key or another new kind use `transport: openssh`",
    )


def authenticate(
    transport: paramiko.Transport, credentials: Credentials, *, where: str, deadline: Deadline, ask: AskPerson | None
) -> None:
    """Returns when the host has let us in. Raises ``AuthRefused``, ``KeyUnreadable`` (when a key file that could not
    be used was all there was), ``ConnectTimeout`` or ``TunnelLost``."""
    attempt = _Attempts(transport, credentials, where, deadline, ask)
    try:
        if not (attempt.keys() or attempt.password() or attempt.questions()):
            raise attempt.refused()
    except EOFError as error:
        raise TunnelLost(f"{where} closed the connection during the login") from error
    except paramiko.AuthenticationException as error:
        # Only time-outs and a dead connection get here: a refusal is noted where it happens.
        if transport.is_active():
            raise ConnectTimeout(f"{where} did not answer the login in time") from error
        raise attempt.refused(disconnected=True) from error
    except (paramiko.SSHException, OSError) as error:
        raise TunnelLost(f"the login at {where} broke off: {printable(str(error), 120)}") from error


class _Agent(paramiko.Agent):
    """Closes its socket also where the agent talks nonsense."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except BaseException:
            self.close()
            raise


class _Attempts:
    """One login. ``allowed`` is what the host last said that it would take; empty: it has not said."""

    def __init__(
        self, transport: paramiko.Transport, who: Credentials, where: str, deadline: Deadline, ask: AskPerson | None
    ) -> None:
        self._transport = transport
        self._who = who
        self._where = where
        self._deadline = deadline
        self._ask = ask
        self._tried: list[str] = []
        self._unusable: list[TunnelError] = []
        self._allowed: tuple[str, ...] = ()

    def keys(self) -> bool:
        for path in self._who.identity_files:
            try:
                key = load_key(path, self._who.passphrase)
            except KeyUnreadable as error:
                self._unusable.append(error)
                continue
            if self._try(f"key {path}", partial(self._transport.auth_publickey, self._who.user, key)):
                return True
        return self._who.agent and self._keys_of_the_agent()

    def _keys_of_the_agent(self) -> bool:
        agent = None
        try:
            agent = _Agent()
            keys = agent.get_keys()[:AGENT_KEYS]
        except (paramiko.SSHException, OSError):
            keys = ()  # no agent after all: then its keys are not tried
        try:
            return any(
                self._try("a key of the agent", partial(self._transport.auth_publickey, self._who.user, key))
                for key in keys
            )
        finally:
            if agent is not None:
                agent.close()

    def password(self) -> bool:
        password = self._who.password
        if password is None or not self._takes("password"):
            return False
        return self._try(
            "the password", lambda: self._transport.auth_password(self._who.user, password, fallback=False)
        )

    def questions(self) -> bool:
        """Keyboard-interactive: a question for a password gets ours, once; the others go to a person."""
        if not self._takes("keyboard-interactive") or (self._who.password is None and self._ask is None):
            return False
        ours = [self._who.password] if self._who.password is not None else []
        asked = 0

        def answer(title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
            nonlocal asked
            answers = []
            for prompt, echo in prompts:
                asked += 1
                if asked > MAX_QUESTIONS:
                    raise paramiko.AuthenticationException("too many questions")
                if ours and not echo and "assw" in prompt:
                    answers.append(ours.pop())
                    continue
                heading = printable(" ".join(part for part in (title, instructions) if part))
                answers.append(self._person(f"{heading} {printable(prompt)}".strip(), echo) or "")
            return answers

        if self._ask is not None:
            self._transport.auth_timeout = self._deadline.remaining_s + ANSWER_TIMEOUT_S
        return self._try("answers to its questions", lambda: self._transport.auth_interactive(self._who.user, answer))

    def refused(self, *, disconnected: bool = False) -> TunnelError:
        if self._unusable and not self._tried:
            return self._unusable[0]
        tried = ", ".join(dict.fromkeys(self._tried)) or "nothing: no key, agent or password is set"
        message = f"{self._where} refuses the login of {self._who.user} (tried {tried})"
        if disconnected:
            message += " and hung up"
        if self._unusable:
            message += f"; {self._unusable[0].message}"
        takes = ", ".join(printable(one, 40) for one in self._allowed[:5])
        hint = f"it takes {takes}: " if takes else ""
        return AuthRefused(
            message, hint=hint + "check `ssh.user`, and that our public key is in the host's authorized_keys"
        )

    def _person(self, text: str, echo: bool) -> str | None:
        if self._ask is None:
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            return self._ask(text, echo)

    def _takes(self, method: str) -> bool:
        return not self._allowed or method in self._allowed

    def _try(self, what: str, attempt: Callable[[], list[str]]) -> bool:
        """True when the host has let us in. A first factor of several is no refusal: what it asks next is noted."""
        if self._deadline.expired:
            raise ConnectTimeout(f"{self._where} did not finish the login in time")
        self._tried.append(what)
        try:
            self._allowed = tuple(attempt())
        except paramiko.BadAuthenticationType as error:
            self._allowed = tuple(error.allowed_types)
            return False
        except paramiko.AuthenticationException:
            if not self._transport.is_active() or self._deadline.expired:
                raise
            return False
        return self._transport.is_authenticated()
