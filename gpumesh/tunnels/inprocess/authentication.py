"""Logs in to an SSH host over paramiko: tries key files, the agent, a password and answers to questions. Blocking.

The attempts use one connection, or two if the host hangs up before all was tried. When all fail, the error says what
was tried, what the host would accept, and what the host said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko

from gpumesh.config.ssh.key_files import is_public_key, read_public_key
from gpumesh.errors import AuthRefused, ConnectTimeout, KeyUnreadable, TunnelError, TunnelLost
from gpumesh.text.printable import printable
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.inprocess.agent_keys import find_agent_key, open_agent_keys
from gpumesh.tunnels.inprocess.host_transport import HostTransport
from gpumesh.tunnels.inprocess.private_keys import PassphraseNeeded, add_certificate, load_key
from gpumesh.tunnels.inprocess.question_answerer import AskPerson, QuestionAnswerer
from gpumesh.tunnels.remote_commands.host_text import add_host_text, make_pending_login_error
from gpumesh.tunnels.transport import ANSWER_TIMEOUT_S

MAX_TRIES = 6  # sshd closes the connection after six failed attempts (MaxAuthTries)
_PASSWORD, _QUESTIONS = "password", "questions"  # the methods with a secret, in ``LoginRecord.refused``


@dataclass(frozen=True, slots=True)
class Credentials:
    """The secrets and keys that a login may try. ``password`` and ``passphrase`` (of the key files) are secrets, so the
    ``repr`` leaves them out. ``agent``: the keys of the user's agent may be tried too; ``identities_only``: only those
    that belong to one of the files."""

    user: str
    identity_files: tuple[Path, ...] = ()
    agent: bool = True
    password: str | None = None
    passphrase: str | None = None
    identities_only: bool = False

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, identity_files={self.identity_files!r}, agent={self.agent})"


@dataclass(slots=True)
class LoginRecord:
    """What one login has done so far, over all its connections, because a host hangs up after a number of attempts.

    ``attempts`` describes what was tried, and ``unusable_keys`` why key files could not be tried, both for the error
    message. ``refused``: the keys, and the methods with a secret, that the host has refused. ``asked``: the files for
    whose passphrase a person was asked. ``host_lines``: the texts that the host sent, by line, not made printable yet.
    """

    attempts: list[str] = field(default_factory=list)
    unusable_keys: dict[Path, KeyUnreadable] = field(default_factory=dict)
    refused: set[bytes | str] = field(default_factory=set)
    asked: set[Path] = field(default_factory=set)
    host_lines: list[str | bytes] = field(default_factory=list)


class LoginCutOff(Exception):
    """The host has hung up after too many attempts. Another connection may make the remaining attempts."""


def authenticate(
    transport: paramiko.Transport,
    credentials: Credentials,
    *,
    address: str,
    deadline: Deadline,
    ask: AskPerson | None,
    record: LoginRecord | None = None,
) -> None:
    """Logs in with ``credentials``, and returns when the host has accepted the login. The caller passes a ``record`` if
    the login may need several connections.

    Raises ``AuthRefused``, ``ConnectTimeout`` or ``TunnelLost``, and ``KeyUnreadable`` when no key file can be used and
    there was nothing else to try. With a ``record``, raises ``LoginCutOff``.
    """
    own_record = LoginRecord() if record is None else record
    login = _Login(transport, credentials, address, deadline, ask, own_record)
    try:
        succeeded = login.try_all()
        _collect_host_lines(transport, own_record)
        if not succeeded:
            raise login.make_refused_error()
    except (EOFError, paramiko.SSHException, OSError) as error:
        _collect_host_lines(transport, own_record)
        if record is not None and not transport.is_active() and login.is_unfinished():
            raise LoginCutOff from error
        raise _broken_login_error(error, login, transport, credentials, address, own_record, deadline) from error


def _broken_login_error(
    error: Exception,
    login: _Login,
    transport: paramiko.Transport,
    credentials: Credentials,
    address: str,
    record: LoginRecord,
    deadline: Deadline,
) -> TunnelError:
    """The error for a login that neither succeeded nor was refused, because of ``error``."""
    if isinstance(error, paramiko.AuthenticationException):
        # Only time-outs and dead connections come here: ``_Login._attempt`` handles a refusal.
        if not transport.is_active():
            return login.make_refused_error(disconnected=True)
        if record.host_lines:
            return make_pending_login_error(address, credentials.user, deadline.timeout_s, record.host_lines)
        return ConnectTimeout(f"{address} did not answer the login in time")
    if isinstance(error, EOFError):
        lost = TunnelLost(f"{address} closed the connection during the login")
    else:
        lost = TunnelLost(f"the login at {address} broke off: {printable(str(error), 120)}")
    return add_host_text(lost, record.host_lines)


def _collect_host_lines(transport: paramiko.Transport, record: LoginRecord) -> None:
    """Moves the lines that the host has sent from the transport to the record."""
    if isinstance(transport, HostTransport):
        record.host_lines += transport.host_lines
        transport.forget_host_lines()


class _Login:
    """One login on one connection. The ``try_`` methods return whether the host has now accepted the login.

    ``_record`` has what earlier connections of the same login have tried. ``_allowed_methods`` are the methods that the
    host last named; empty: the host has not named any. ``_tries`` counts the attempts that the host counts, too.
    """

    def __init__(
        self,
        transport: paramiko.Transport,
        credentials: Credentials,
        address: str,
        deadline: Deadline,
        ask: AskPerson | None,
        record: LoginRecord,
    ) -> None:
        self._transport = transport
        self._credentials = credentials
        self._address = address
        self._deadline = deadline
        self._ask_person = ask
        self._record = record
        self._tries = 0
        self._allowed_methods: tuple[str, ...] = ()

    def try_all(self) -> bool:
        """Tries method after method, each only if all before it have failed."""
        if self._try_none():
            return True
        if self._record.attempts:  # a second connection, because keys used up the tries of the first
            return self._try_secrets() or self._try_keys() or self._try_secrets()
        return self._try_keys() or self._try_secrets()

    def _try_none(self) -> bool:
        """Asks to be let in without any proof, as ssh does. A host may do so (Tailscale), or names its methods."""
        return self._attempt(None, lambda: self._transport.auth_none(self._credentials.user))

    def _try_keys(self) -> bool:
        """Tries the key files in their order, and then the other keys of the agent."""
        if not self._host_accepts("publickey"):
            return False
        with contextlib.ExitStack() as stack:
            agent = _LazyAgent(stack, enabled=self._credentials.agent)
            for path in self._credentials.identity_files:
                try:
                    key = self._load_key(path, agent)
                except KeyUnreadable as error:
                    self._record.unusable_keys.setdefault(path, error)
                    continue
                if self._try_key(_key_name(path), key):
                    return True
            if self._credentials.identities_only:
                return False
            return any(self._try_key("a key of the agent", key) for key in self._list_other_keys(agent))

    def _load_key(self, path: Path, agent: _LazyAgent) -> paramiko.PKey:
        """The key that belongs to a file: from the file; else the agent's; else with a passphrase that a person gives.

        The file may be a public key, or encrypted. Raises ``KeyUnreadable``.
        """
        try:
            return load_key(path, self._credentials.passphrase)
        except KeyUnreadable as error:
            public_key = read_public_key(path.expanduser())
            agent_key = None if public_key is None else find_agent_key(agent.keys, public_key)
            if agent_key is not None:
                add_certificate(agent_key, path)
                return agent_key
            if isinstance(error, PassphraseNeeded) and self._ask_person is not None and path not in self._record.asked:
                self._record.asked.add(path)
                passphrase = self._ask_outside_deadline(f"passphrase for key {printable(str(path))}:", False)
                if passphrase:
                    return load_key(path, passphrase)
            if public_key is not None and is_public_key(path.expanduser()):
                raise KeyUnreadable(
                    f"{path} is a public key, and no agent here has its private key",
                    hint="name the private key file, or add the key to your agent (`ssh-add`)",
                ) from error
            raise

    def _list_other_keys(self, agent: _LazyAgent) -> Iterator[paramiko.AgentKey]:
        """The keys of the agent, as long as the host allows a further try, and one for the password."""
        needs_secret = self._credentials.password is not None or self._ask_person is not None
        reserved_tries = 1 if needs_secret and self._host_accepts_secret() else 0
        for key in agent.keys:
            if self._tries >= MAX_TRIES - reserved_tries:
                return
            yield key

    def _try_key(self, description: str, key: paramiko.PKey) -> bool:
        """Tries a key, unless the host has refused it before."""
        key_id = key.public_blob.key_blob if key.public_blob is not None else key.asbytes()
        if key_id in self._record.refused:
            return False
        self._record.refused.add(key_id)  # also if the host hangs up now
        if self._attempt(description, lambda: self._log_in_with_key(key)):
            return True
        if self._is_partial:
            self._record.refused.discard(key_id)  # a first factor: needed on every connection
        return False

    def _log_in_with_key(self, key: paramiko.PKey) -> list[str]:
        """Logs in with a key. A key of the agent signs only if the host takes the key."""
        transport, user = self._transport, self._credentials.user
        try:
            if isinstance(key, paramiko.AgentKey) and isinstance(transport, HostTransport):
                transport.ensure_key_is_acceptable(user, key)
            return transport.auth_publickey(user, key)
        except paramiko.SSHException as error:
            if isinstance(error, paramiko.AuthenticationException) or not transport.is_active():
                raise
            # The agent does not sign: it is locked, the token is not there, or a person has declined.
            self._record.attempts[-1] += ", which the agent did not use to sign"
            raise paramiko.AuthenticationException(str(error)) from error

    def _try_secrets(self) -> bool:
        return self._try_password() or self._try_questions()

    def _try_password(self) -> bool:
        """Tries our password, if there is one and the host may accept a password."""
        password = self._credentials.password
        if password is None or not self._host_accepts("password") or _PASSWORD in self._record.refused:
            return False
        self._record.refused.add(_PASSWORD)
        return self._attempt(
            "the password", lambda: self._transport.auth_password(self._credentials.user, password, fallback=False)
        )

    def _try_questions(self) -> bool:
        """Tries keyboard-interactive: our password and a person answer the host's questions."""
        password = self._credentials.password
        if password is None and self._ask_person is None:
            return False  # no question could be answered
        if not self._host_accepts("keyboard-interactive") or _QUESTIONS in self._record.refused:
            return False
        self._record.refused.add(_QUESTIONS)
        answerer = QuestionAnswerer(password, self._ask_outside_deadline)
        extra_s = 0.0 if self._ask_person is None else ANSWER_TIMEOUT_S  # the time of a person
        succeeded = self._attempt(
            "answers to its questions",
            lambda: self._transport.auth_interactive(self._credentials.user, answerer.answer),
            extra_s,
        )
        self._record.host_lines += answerer.notices
        return succeeded

    def is_unfinished(self) -> bool:
        """Whether something is left that another connection could try, now that the host has hung up."""
        has_password = self._credentials.password is not None and self._host_accepts_secret()
        password_is_left = has_password and not {_PASSWORD, _QUESTIONS} & self._record.refused
        return password_is_left or bool(self._list_untried_files())

    def _list_untried_files(self) -> list[str]:
        """The usable key files, as ``LoginRecord.attempts`` has them, that were not tried."""
        usable_files = [path for path in self._credentials.identity_files if path not in self._record.unusable_keys]
        return [name for name in map(_key_name, usable_files) if name not in self._record.attempts]

    def make_refused_error(self, *, disconnected: bool = False) -> TunnelError:
        """The error for a login without a successful attempt. ``disconnected``: the host has closed the connection.

        If no attempt was made because no key file can be used, returns the error of the first key file.
        """
        unusable_keys = list(self._record.unusable_keys.values())
        if unusable_keys and not self._record.attempts:
            return add_host_text(unusable_keys[0], self._record.host_lines)
        tried = ", ".join(dict.fromkeys(self._record.attempts)) or "nothing: no key, agent or password is set"
        message = f"{self._address} refuses the login of {self._credentials.user} (tried {tried})"
        if disconnected:
            message += " and hung up"
        elif not self._host_accepts("publickey") and (untried_files := self._list_untried_files()):
            message += f"; it takes no keys, so these were not tried: {', '.join(untried_files)}"
        if unusable_keys:
            message += f"; {unusable_keys[0].message}"
        accepted = ", ".join(printable(method, 40) for method in self._allowed_methods[:5])
        hint = f"it takes {accepted}: " if accepted else ""
        error = AuthRefused(
            message, hint=hint + "check `ssh.user`, and that our public key is in the host's authorized_keys"
        )
        return add_host_text(error, self._record.host_lines)

    def _ask_outside_deadline(self, text: str, echo: bool) -> str | None:
        """Asks a person; the deadline moves by the time that the person takes. ``None``: there is no answer."""
        if self._ask_person is None:
            return None
        with self._deadline.paused(ANSWER_TIMEOUT_S):
            return self._ask_person(text, echo)

    def _host_accepts(self, method: str) -> bool:
        """Whether the host has named this method, or has not named any."""
        return not self._allowed_methods or method in self._allowed_methods

    def _host_accepts_secret(self) -> bool:
        return self._host_accepts("password") or self._host_accepts("keyboard-interactive")

    def _attempt(self, description: str | None, log_in: Callable[[], list[str]], extra_s: float = 0.0) -> bool:
        """Calls ``log_in``, and returns true when the host has accepted the login. Raises ConnectTimeout.

        Returns false after a refusal, or after the first of several factors (``_is_partial``). Then
        ``_allowed_methods`` are the methods that may come next. ``description``: what is tried, for messages; ``None``
        for a try that the host does not count, because nothing was shown to it. ``extra_s``: seconds that a person may
        need.
        """
        if self._deadline.expired:
            raise ConnectTimeout(f"{self._address} did not finish the login in time")
        # paramiko has a time-out for each attempt; our deadline is for all together.
        self._transport.auth_timeout = max(0.1, self._deadline.remaining_s) + extra_s
        self._is_partial = False
        if description is not None:
            self._record.attempts.append(description)
            self._tries += 1
        try:
            self._allowed_methods = tuple(log_in())
            self._is_partial = not self._transport.is_authenticated()
        except paramiko.BadAuthenticationType as error:
            self._allowed_methods = tuple(error.allowed_types)
            return False
        except paramiko.AuthenticationException:
            # A dead connection or a time-out, for which ``authenticate`` makes the error; otherwise a refusal.
            if not self._transport.is_active() or self._deadline.expired:
                raise
            return False
        return self._transport.is_authenticated()


def _key_name(path: Path) -> str:
    return f"key {path}"


class _LazyAgent:
    """The keys of the agent, which is asked only when they are needed: an agent may hang, or ask a person."""

    def __init__(self, stack: contextlib.ExitStack, *, enabled: bool) -> None:
        """``stack``: the agent is closed with it."""
        self._stack = stack
        self._enabled = enabled
        self._keys: tuple[paramiko.AgentKey, ...] | None = None  # ``None``: the agent was not asked yet

    @property
    def keys(self) -> tuple[paramiko.AgentKey, ...]:
        if self._keys is None:
            self._keys = self._stack.enter_context(open_agent_keys(enabled=self._enabled))
        return self._keys
