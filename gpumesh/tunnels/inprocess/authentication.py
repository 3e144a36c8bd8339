"""Logs in to an SSH host: with key files, the agent, a password, answers to questions; in this order. Blocking.

All attempts use one connection. When all fail, the error says what was tried and what the host would accept.
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
"""Asks a person: gets the text, and whether the answer may be shown. Blocks; ``None``: nobody answers."""

MAX_AGENT_KEYS = 5  # sshd gives up after six failures (MaxAuthTries)
MAX_QUESTIONS = 10  # from one host


@dataclass(frozen=True, slots=True)
class Credentials:
    """What may be tried. ``password`` and ``passphrase`` are secrets, so the ``repr`` leaves them out."""

    user: str
    identity_files: tuple[Path, ...] = ()
    agent: bool = True
    password: str | None = None
    passphrase: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, identity_files={self.identity_files!r}, agent={self.agent})"


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """A private key, with the certificate next to it if there is one. Raises ``KeyUnreadable``."""
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
            continue  # another kind of key, or a wrong passphrase: the error does not tell which
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
    transport: paramiko.Transport, credentials: Credentials, *, address: str, deadline: Deadline, ask: AskPerson | None
) -> None:
    """Returns when the host has accepted us. Raises ``AuthRefused``, ``KeyUnreadable`` (when there was nothing to try
    but key files that cannot be used), ``ConnectTimeout`` or ``TunnelLost``."""
    login = _Login(transport, credentials, address, deadline, ask)
    try:
        if not (login.try_keys() or login.try_password() or login.try_questions()):
            raise login.make_refused_error()
    except EOFError as error:
        raise TunnelLost(f"{address} closed the connection during the login") from error
    except paramiko.AuthenticationException as error:
        # Only time-outs and dead connections come here: refusals are recorded where they happen.
        if transport.is_active():
            raise ConnectTimeout(f"{address} did not answer the login in time") from error
        raise login.make_refused_error(disconnected=True) from error
    except (paramiko.SSHException, OSError) as error:
        raise TunnelLost(f"the login at {address} broke off: {printable(str(error), 120)}") from error


class _Agent(paramiko.Agent):
    """Closes its socket also when the agent does not speak the protocol."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except BaseException:
            self.close()
            raise


class _Login:
    """One login. ``allowed`` are the methods that the host last said it accepts; empty: it has not said."""

    def __init__(
        self,
        transport: paramiko.Transport,
        credentials: Credentials,
        address: str,
        deadline: Deadline,
        ask: AskPerson | None,
    ) -> None:
        self._transport = transport
        self._credentials = credentials
        self._address = address
        self._deadline = deadline
        self._ask_person = ask
        self._tried: list[str] = []
        self._unusable_keys: list[TunnelError] = []
        self._allowed: tuple[str, ...] = ()

    def try_keys(self) -> bool:
        for path in self._credentials.identity_files:
            try:
                key = load_key(path, self._credentials.passphrase)
            except KeyUnreadable as error:
                self._unusable_keys.append(error)
                continue
            if self._try(f"key {path}", partial(self._transport.auth_publickey, self._credentials.user, key)):
                return True
        return self._credentials.agent and self._try_agent_keys()

    def _try_agent_keys(self) -> bool:
        agent = None
        try:
            agent = _Agent()
            keys = agent.get_keys()[:MAX_AGENT_KEYS]
        except (paramiko.SSHException, OSError):
            keys = ()  # there is no agent
        try:
            return any(
                self._try("a key of the agent", partial(self._transport.auth_publickey, self._credentials.user, key))
                for key in keys
            )
        finally:
            if agent is not None:
                agent.close()

    def try_password(self) -> bool:
        password = self._credentials.password
        if password is None or not self._accepts("password"):
            return False
        return self._try(
            "the password", lambda: self._transport.auth_password(self._credentials.user, password, fallback=False)
        )

    def try_questions(self) -> bool:
        """Keyboard-interactive: a question for a password gets our password, once. Other questions go to a person."""
        if not self._accepts("keyboard-interactive") or (
            self._credentials.password is None and self._ask_person is None
        ):
            return False
        unused_passwords = [self._credentials.password] if self._credentials.password is not None else []
        question_count = 0

        def answer(title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
            nonlocal question_count
            answers = []
            for prompt, echo in prompts:
                question_count += 1
                if question_count > MAX_QUESTIONS:
                    raise paramiko.AuthenticationException("too many questions")
                if unused_passwords and not echo and "assw" in prompt:
                    answers.append(unused_passwords.pop())
                    continue
                heading = printable(" ".join(part for part in (title, instructions) if part))
                answers.append(self._ask_in_time(f"{heading} {printable(prompt)}".strip(), echo) or "")
            return answers

        if self._ask_person is not None:
            self._transport.auth_timeout = self._deadline.remaining_s + ANSWER_TIMEOUT_S
        return self._try(
            "answers to its questions", lambda: self._transport.auth_interactive(self._credentials.user, answer)
        )

    def make_refused_error(self, *, disconnected: bool = False) -> TunnelError:
        if self._unusable_keys and not self._tried:
            return self._unusable_keys[0]
        tried = ", ".join(dict.fromkeys(self._tried)) or "nothing: no key, agent or password is set"
        message = f"{self._address} refuses the login of {self._credentials.user} (tried {tried})"
        if disconnected:
            message += " and hung up"
        if self._unusable_keys:
            message += f"; {self._unusable_keys[0].message}"
        accepted = ", ".join(printable(method, 40) for method in self._allowed[:5])
        hint = f"it takes {accepted}: " if accepted else ""
        return AuthRefused(
            message, hint=hint + "check `ssh.user`, and that our public key is in the host's authorized_keys"
        )

    def _ask_in_time(self, text: str, echo: bool) -> str | None:
        if self._ask_person is None:
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            return self._ask_person(text, echo)

    def _accepts(self, method: str) -> bool:
        return not self._allowed or method in self._allowed

    def _try(self, description: str, attempt: Callable[[], list[str]]) -> bool:
        """True when the host has accepted us. After the first of several factors, ``allowed`` are the next methods."""
        if self._deadline.expired:
            raise ConnectTimeout(f"{self._address} did not finish the login in time")
        self._tried.append(description)
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
