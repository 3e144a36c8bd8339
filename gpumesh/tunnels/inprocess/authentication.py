"""Logs in to an SSH host. Tries key files, then the agent, a password, and answers to questions. Blocking.

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
"""Asks a person. Its arguments are the text, and whether the answer may be shown. Blocks. ``None``: no answer."""

MAX_AGENT_KEYS = 5  # sshd closes the connection after six failed attempts (MaxAuthTries)
MAX_QUESTIONS = 10  # that one host may ask in one login


@dataclass(frozen=True, slots=True)
class Credentials:
    """The secrets and keys that a login may try. ``password`` and ``passphrase`` are secrets, so the ``repr`` leaves
    them out."""

    user: str
    identity_files: tuple[Path, ...] = ()
    agent: bool = True
    password: str | None = None
    passphrase: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, identity_files={self.identity_files!r}, agent={self.agent})"


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """A private key, with the certificate next to it if there is one. Raises ``KeyUnreadable``."""
    key = _read_private_key(path, passphrase)
    certificate = path.expanduser().with_name(path.name + "-cert.pub")
    try:
        if certificate.exists():
            key.load_certificate(str(certificate))
    except (paramiko.SSHException, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else printable(str(error), 120)
        raise KeyUnreadable(
            f"certificate {certificate} cannot be used with its key: {reason or type(error).__name__}",
            hint="sign the key again, or move the certificate away; check its owner and mode",
        ) from error
    return key


def _read_private_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """Tries paramiko's key types in turn: paramiko has no function that finds the type. Raises ``KeyUnreadable``."""
    for key_type in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            return key_type.from_private_key_file(str(path.expanduser()), passphrase)
        except FileNotFoundError as error:
            raise KeyUnreadable(f"there is no key file {path}", hint="check `ssh.identity_file`") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise KeyUnreadable(f"key file {path} cannot be read: {reason}", hint="check its owner and mode") from error
        except paramiko.PasswordRequiredException as error:
            raise KeyUnreadable(
                f"key file {path} needs a passphrase",
                hint="name its variable in `ssh.passphrase_env`, or add the key to your agent (`ssh-add`)",
            ) from error
        except (paramiko.SSHException, ValueError, TypeError):
            continue  # paramiko raises the same errors for another type of key and for a wrong passphrase
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
    """Returns when the host has accepted us.

    Raises ``AuthRefused``, ``ConnectTimeout`` or ``TunnelLost``, and ``KeyUnreadable`` when no key file can be used and
    there was nothing else to try.
    """
    login = _Login(transport, credentials, address, deadline, ask)
    try:
        if not (login.try_keys() or login.try_password() or login.try_questions()):
            raise login.make_refused_error()
    except EOFError as error:
        raise TunnelLost(f"{address} closed the connection during the login") from error
    except paramiko.AuthenticationException as error:
        # Only time-outs and dead connections come here: ``_Login._attempt`` handles a refusal.
        if transport.is_active():
            raise ConnectTimeout(f"{address} did not answer the login in time") from error
        raise login.make_refused_error(disconnected=True) from error
    except (paramiko.SSHException, OSError) as error:
        raise TunnelLost(f"the login at {address} broke off: {printable(str(error), 120)}") from error


class _Agent(paramiko.Agent):
    """paramiko's agent. Its socket is closed also when the constructor fails, because no agent speaks at the other
    end."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except BaseException:
            self.close()
            raise


class _Login:
    """One login. ``_allowed_methods`` are those that the host last named; empty: the host has not named any."""

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
        self._attempts: list[str] = []
        self._unusable_keys: list[TunnelError] = []
        self._allowed_methods: tuple[str, ...] = ()

    def try_keys(self) -> bool:
        for path in self._credentials.identity_files:
            try:
                key = load_key(path, self._credentials.passphrase)
            except KeyUnreadable as error:
                self._unusable_keys.append(error)
                continue
            if self._attempt(f"key {path}", partial(self._transport.auth_publickey, self._credentials.user, key)):
                return True
        return self._credentials.agent and self._try_agent_keys()

    def _try_agent_keys(self) -> bool:
        agent = None
        try:
            agent = _Agent()
            keys = agent.get_keys()[:MAX_AGENT_KEYS]
        except (paramiko.SSHException, OSError):
            keys = ()  # there is no agent, or it does not answer as an agent does
        try:
            return any(
                self._attempt(
                    "a key of the agent", partial(self._transport.auth_publickey, self._credentials.user, key)
                )
                for key in keys
            )
        finally:
            if agent is not None:
                agent.close()

    def try_password(self) -> bool:
        password = self._credentials.password
        if password is None or not self._host_accepts("password"):
            return False
        return self._attempt(
            "the password", lambda: self._transport.auth_password(self._credentials.user, password, fallback=False)
        )

    def try_questions(self) -> bool:
        """Keyboard-interactive. The first hidden question for a password gets our password; all others go to a
        person."""
        if not self._host_accepts("keyboard-interactive") or (
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
                if unused_passwords and not echo and "assw" in prompt:  # "Password:" or "password for …"
                    answers.append(unused_passwords.pop())
                    continue
                heading = printable(" ".join(part for part in (title, instructions) if part))
                answers.append(self._ask_outside_deadline(f"{heading} {printable(prompt)}".strip(), echo) or "")
            return answers

        if self._ask_person is not None:
            self._transport.auth_timeout = self._deadline.remaining_s + ANSWER_TIMEOUT_S
        return self._attempt(
            "answers to its questions", lambda: self._transport.auth_interactive(self._credentials.user, answer)
        )

    def make_refused_error(self, *, disconnected: bool = False) -> TunnelError:
        if self._unusable_keys and not self._attempts:
            return self._unusable_keys[0]
        tried = ", ".join(dict.fromkeys(self._attempts)) or "nothing: no key, agent or password is set"
        message = f"{self._address} refuses the login of {self._credentials.user} (tried {tried})"
        if disconnected:
            message += " and hung up"
        if self._unusable_keys:
            message += f"; {self._unusable_keys[0].message}"
        accepted = ", ".join(printable(method, 40) for method in self._allowed_methods[:5])
        hint = f"it takes {accepted}: " if accepted else ""
        return AuthRefused(
            message, hint=hint + "check `ssh.user`, and that our public key is in the host's authorized_keys"
        )

    def _ask_outside_deadline(self, text: str, echo: bool) -> str | None:
        if self._ask_person is None:
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            return self._ask_person(text, echo)

    def _host_accepts(self, method: str) -> bool:
        return not self._allowed_methods or method in self._allowed_methods

    def _attempt(self, description: str, log_in: Callable[[], list[str]]) -> bool:
        """Calls ``log_in``. True when the host has accepted us; false after a refusal, or after the first of several
        factors. Then ``_allowed_methods`` are the methods that may come next."""
        if self._deadline.expired:
            raise ConnectTimeout(f"{self._address} did not finish the login in time")
        self._attempts.append(description)
        try:
            self._allowed_methods = tuple(log_in())
        except paramiko.BadAuthenticationType as error:
            self._allowed_methods = tuple(error.allowed_types)
            return False
        except paramiko.AuthenticationException:
            if not self._transport.is_active() or self._deadline.expired:
                raise
            return False
        return self._transport.is_authenticated()
