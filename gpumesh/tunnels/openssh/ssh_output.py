"""What an ``ssh`` prints: its own log, apart from the text of the host and of a ProxyCommand.

By default ssh writes its log to stderr. A host's banner and a ProxyCommand's messages come there too, and a banner
could imitate a line of the log. So the log goes to a FIFO (``ssh -E``), and only the log shows what ssh has done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from pathlib import Path

from gpumesh.errors import TunnelError
from gpumesh.tunnels.openssh.errors import error_from_stderr
from gpumesh.tunnels.remote_commands.host_text import add_host_text, error_from_greeting, make_pending_login_error

KEPT_LINES = 40  # of each kind, the last lines are kept

# Values of LogVerbose, which ssh has from 8.5 on. The function that reads a host's greeting reports what it reads. The
# loop that serves our session reports that it has begun, which is after the login.
GREETING_LOG = "kex.c:kex_exchange_identification():*"
BANNER_LOG = "sshconnect2.c:input_userauth_banner():*"  # reports that a banner comes
LOGIN_LOG = "clientloop.c:client_loop():*"
HOST_DEBUG_LOG = "packet.c:ssh_packet_read_poll_seqnr():*"  # reports the texts that the host sends for a log
_VERBOSE_PREFIX = re.compile(r"^(debug\d: )?(?:kex|sshconnect2|clientloop|packet)\.c:(\w+)\(\):\d+ \([^)]*\): ")
_BANNER = "input_userauth_banner: "
_HOST_DEBUG = "ssh_packet_read_poll_seqnr: Remote: "
_LOGGED_IN = "client_loop: Entering interactive session"
_SESSION_NOISE = re.compile(r"^client_loop: (pledge: |Transferred: |Bytes per second: |Exit status )")
_BEFORE_GREETING = re.compile(r"^kex_exchange_identification: banner line \d+: (.*)")
_GREETING = re.compile(r"^kex_exchange_identification: Remote protocol version \S+, remote software version (.*)")
_VERBOSE_NOISE = "kex_exchange_identification: Local version string"


def log_path(control: Path) -> Path:
    """The FIFO for the log of the ssh whose control socket is ``control``."""
    return control.with_name(control.name + "l")


class SshLog:
    """The reading end of the FIFO to which ssh writes its log. ``reader`` ends after ``end``, when no process has the
    FIFO open any more."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, transport: asyncio.ReadTransport, writer: int) -> None:
        self.reader = reader
        self._path = path
        self._transport = transport
        self._writer: int | None = writer  # keeps the FIFO from ending before ssh has opened it

    @classmethod
    async def open(cls, path: Path) -> SshLog:
        """Makes the FIFO (0600) and opens it. Raises ``TunnelError``."""
        with contextlib.ExitStack() as stack:
            try:
                os.mkfifo(path, 0o600)
                stack.callback(path.unlink, missing_ok=True)
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                file = stack.enter_context(os.fdopen(descriptor, "rb", buffering=0))
                writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                stack.callback(os.close, writer)
            except OSError as error:
                raise TunnelError(f"the log of ssh cannot be made: {error.strerror}") from error
            reader = asyncio.StreamReader()
            loop = asyncio.get_running_loop()
            transport, _protocol = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
            stack.pop_all()  # from now on, ``close`` closes them
        return cls(path, reader, transport, writer)

    def end(self) -> None:
        """Called when ssh has ended. May be called twice."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def close(self) -> None:
        """Closes and removes the FIFO. May be called twice."""
        self.end()
        self._transport.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


class SshOutput:
    """The last lines of one ssh, all made printable.

    ``log``: ssh's own log. ``other_lines``: the other lines of its stderr. ``server``: the software that the host's
    greeting names; ``None``: no greeting was seen (yet, or by an ssh before 8.5). ``logged_in``: ssh has reported that
    it is logged in, which an ssh before 8.5 does not. ``failed_after_login``: it has logged something after that.
    ``has_banner``: the host, or a jump host, has sent a banner, so some of ``other_lines`` are its own.
    ``host_debug_lines``: texts that the host has sent for a log, such as the reason of a refusal; only with
    ``HOST_DEBUG_LOG``.
    """

    def __init__(self) -> None:
        self.log: deque[str] = deque(maxlen=KEPT_LINES)
        self.other_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.host_debug_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.server: str | None = None
        self.has_banner = False
        self.logged_in = False
        self.failed_after_login = False
        self._before_greeting: list[str] = []  # lines that a host sent before its greeting; empty after the greeting

    def add_log_line(self, line: str) -> str | None:
        """Keeps a line of the log, and returns it in its usual form; ``None`` if the line says nothing about errors."""
        text = _VERBOSE_PREFIX.sub(r"\2: ", line)
        if match := _BEFORE_GREETING.match(text):
            if len(self._before_greeting) < KEPT_LINES:
                self._before_greeting.append(match[1])
            return None
        if match := _GREETING.match(text):
            self.server = match[1]
            self._before_greeting.clear()  # a greeting may come after other lines
            return None
        if text.startswith(_HOST_DEBUG):
            self.host_debug_lines.append(text.removeprefix(_HOST_DEBUG))
            return None
        if text.startswith(_BANNER):
            self.has_banner = True
            return None
        if text.startswith(_LOGGED_IN):
            self.logged_in = True
            return None
        # A line of "@" belongs to the frame around ssh's warning of a changed host key.
        if not text or set(text) == {"@"} or text.startswith(_VERBOSE_NOISE):
            return None
        if _SESSION_NOISE.match(text):
            return None
        self.failed_after_login = self.logged_in
        self.log.append(text)
        return text

    def add_stderr_line(self, line: str) -> None:
        """Keeps a line of stderr."""
        if line:
            self.other_lines.append(line)

    def make_error(self, destination: str, *, was_up: bool = False, last_line: str | None = None) -> TunnelError:
        """The error for an ssh process that has ended. ``was_up``: the process was connected before. ``last_line``: one
        more line, which counts as the last line of the log."""
        log = [*self.log, *([] if last_line is None else [last_line])]
        if self._before_greeting:
            return error_from_greeting(" ".join(self._before_greeting), destination)
        if self.server is None:
            # No host has sent a greeting, so these lines are not from a host. They are from ssh, before it opened its
            # log, or from a ProxyCommand, which may be an ssh too.
            log = [*self.other_lines, *log]
        error = error_from_stderr(log, destination, was_up=was_up)
        if was_up:  # the text that came at the login does not explain a later end: the log has the reason
            return error
        # Without a banner and a session, only a ProxyCommand can have written here.
        is_of_host = self.server is None or self.has_banner or self.logged_in
        return add_host_text(error, self.other_lines, speaker="it" if is_of_host else "its ProxyCommand")

    def make_timeout_error(self, destination: str, user: str, timeout_s: float) -> TunnelError | None:
        """The error for an ssh process that we ended because it took longer than ``timeout_s``. ``None`` if nothing
        that it printed says why it took so long."""
        printed_error = self.make_error(destination) if self.log or self.other_lines or self._before_greeting else None
        if printed_error is not None and type(printed_error) is not TunnelError:  # a subclass: the text is known
            return printed_error
        if self.has_banner and self.other_lines:
            return make_pending_login_error(destination, user, timeout_s, self.other_lines)
        return None
