"""Logs in to an SSH host over paramiko: tries key files, the agent, a password and answers to questions. Blocking.

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
"""Asks a person and blocks until the answer; ``None``: no answer. Arguments: the text; whether to show the answer."""

MAX_AGENT_KEYS = 5  # sshd closes the connection after six failed attempts (MaxAuthTries)
MAX_QUESTIONS = 10  # a host may ask this many questions in one login


@dataclass(frozen=True, slots=True)
class Credentials:
    """The secrets and keys that a login may try. ``password`` and ``passphrase`` (of the key files) are secrets, so the
    ``repr`` leaves them out. ``agent``: the keys of the user's agent may be tried too."""

    user: str
    identity_files: tuple[Path, ...] = ()
    agent: bool = True
    password: str | None = None
    passphrase: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, identity_files={self.identity_files!r}, agent={self.agent})"


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey:
    """Loads a private key, and the certificate ``PATH-cert.pub`` if there is one. Raises ``KeyUnreadable``."""
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
    """Loads a private key. Tries each key type: paramiko has no function that finds the type. Raises KeyUnreadable."""
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
    """Logs in with ``credentials``, and returns when the host has accepted the login.

    Raises ``AuthRefused``, ``ConnectTimeout`` or ``TunnelLost``, and ``KeyUnreadable`` when no key file can be used and
    there was nothing else to try.
    """
    login = _Login(transport, credentials, address, deadline, ask)
    try:
        # Each method is tried only if all methods before it have failed.
        succeeded = login.try_keys() or login.try_password() or login.try_questions()
        if not succeeded:
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
    """paramiko's agent, which also closes its socket when its constructor fails: then another program, which is no
    agent, listens at the socket."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except BaseException:
            self.close()
            raise


class _QuestionAnswerer:
    """Answers the host's questions in one keyboard-interactive login.

    The first question for a password whose answer must not be shown gets ``password``. All other questions go to
    ``ask``; so does a second question for a password, because then ours was refused or another is meant.
    """

    def __init__(self, password: str | None, ask: AskPerson) -> None:
        self._unused_password = password
        self._ask = ask
        self._question_count = 0

    def answer(self, title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
        """Called by paramiko with one group of questions. ``prompts`` has each question, and whether to show its
        answer."""
        heading = printable(" ".join(part for part in (title, instructions) if part))
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


class _Login:
    """One login. The ``try_`` methods return whether the host has now accepted the login.

    ``_attempts`` describes what was tried, and ``_unusable_keys`` why key files could not be tried, both for the error
    message. ``_allowed_methods`` are the methods that the host last named; empty: the host has not named any.
    """

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
        """Tries the key files that can be used, and then the keys of the agent."""
        for path in self._credentials.identity_files:
            try:
                key = load_key(path, self._credentials.passphrase)
            except KeyUnreadable as error:
                self._unusable_keys.append(error)
                continue
            if self._attempt(f"key {path}", partial(self._transport.auth_publickey, self._credentials.user, key)):
                return True
        if not self._credentials.agent:
            return False
        return self._try_agent_keys()

    def _try_agent_keys(self) -> bool:
        """Tries the first ``MAX_AGENT_KEYS`` keys of the agent, if there is an agent."""
        agent: _Agent | None = None
        try:
            agent = _Agent()
            keys = agent.get_keys()[:MAX_AGENT_KEYS]
        except (paramiko.SSHException, OSError):
            keys = ()  # there is no agent, or it does not answer as an agent does
        try:
            for key in keys:
                log_in = partial(self._transport.auth_publickey, self._credentials.user, key)
                if self._attempt("a key of the agent", log_in):
                    return True
            return False
        finally:
            if agent is not None:
                agent.close()

    def try_password(self) -> bool:
        """Tries our password, if there is one and the host may accept a password."""
        password = self._credentials.password
        if password is None or not self._host_accepts("password"):
            return False
        return self._attempt(
            "the password", lambda: self._transport.auth_password(self._credentials.user, password, fallback=False)
        )

    def try_questions(self) -> bool:
        """Tries keyboard-interactive: our password and a person answer the host's questions."""
        password = self._credentials.password
        if password is None and self._ask_person is None:
            return False  # no question could be answered
        if not self._host_accepts("keyboard-interactive"):
            return False
        answerer = _QuestionAnswerer(password, self._ask_outside_deadline)
        if self._ask_person is not None:  # paramiko's time-out for this attempt then has to include the person's time
            self._transport.auth_timeout = self._deadline.remaining_s + ANSWER_TIMEOUT_S
        return self._attempt(
            "answers to its questions",
            lambda: self._transport.auth_interactive(self._credentials.user, answerer.answer),
        )

    def make_refused_error(self, *, disconnected: bool = False) -> TunnelError:
        """The error for a login of which no attempt succeeded. ``disconnected``: the host has closed the connection.

        If nothing was tried because the key files cannot be used, this is the error of the first of these files.
        """
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
        """Asks a person; the deadline moves by the time that the person takes. ``None``: there is no answer."""
        if self._ask_person is None:
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            return self._ask_person(text, echo)

    def _host_accepts(self, method: str) -> bool:
        """Whether the host has named this method, or has not named any."""
        return not self._allowed_methods or method in self._allowed_methods

    def _attempt(self, description: str, log_in: Callable[[], list[str]]) -> bool:
        """Calls ``log_in``, and returns true when the host has accepted the login. Raises ConnectTimeout.

        Returns false after a refusal, or after the first of several factors. Then ``_allowed_methods`` are the methods
        that may come next.
        """
        if self._deadline.expired:
            raise ConnectTimeout(f"{self._address} did not finish the login in time")
        self._attempts.append(description)
        try:
            self._allowed_methods = tuple(log_in())
        except paramiko.BadAuthenticationType as error:
            self._allowed_methods = tuple(error.allowed_types)
            return False
        except paramiko.AuthenticationException:
            # A dead connection or a time-out, for which ``authenticate`` makes the error; otherwise a refusal.
            if not self._transport.is_active() or self._deadline.expired:
                raise
            return False
        return self._transport.is_authenticated()
