"""Transport ``openssh``: the system's ``ssh``, for what paramiko cannot do (ProxyCommand, Match, FIDO keys,
certificates, IdentityAgent). Runs in the worker's process.

One ``ssh`` child, the *master*, holds the connection. Its own session runs ``cat`` on the host, which has three uses:
sshd sets TCP_NODELAY when a session opens (facts: tunnel-latency.md: 43 ms a request without); an echoed line is the
round trip, and a sign of life that the host itself gave; and when our process dies, however that may be, the session's
input ends, ``cat`` with it, and then the master. A host that allows no command gets a master without a session.

Forwards are Unix sockets of the master in a 0700 folder; forwarder.py relays the node's permanent listeners to them.
Commands are further clients of the master's control socket. No secret is in any argument (prompts.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from gpumesh.config import environment
from gpumesh.errors import (
    ConnectTimeout,
    ExecError,
    ForwardingForbidden,
    HostKeyRevoked,
    KeyUnreadable,
    TransportUnsupported,
    TunnelError,
    TunnelLost,
)
from gpumesh.printable import printable
from gpumesh.quoting import shell_words
from gpumesh.topology import HostKeyPolicy, SshSpec, Target
from gpumesh.tunnels import blocking, hostkeys
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.forwarder import Dialer, Forwarder, relay_to_unix
from gpumesh.tunnels.heartbeat import RESEND_S
from gpumesh.tunnels.hostkeys import host_key_algorithms
from gpumesh.tunnels.jump_hosts import parse_jump
from gpumesh.tunnels.local_system import child_process
from gpumesh.tunnels.local_system.local_command import release_process, wait_for_exit
from gpumesh.tunnels.local_system.peer_users import open_own_user_filter
from gpumesh.tunnels.local_system.socket_folders import private_folder
from gpumesh.tunnels.openssh import errors as openssh_errors
from gpumesh.tunnels.openssh import mux as openssh_mux
from gpumesh.tunnels.openssh.prompts import AskpassServer
from gpumesh.tunnels.remote_command import wrap_killable
from gpumesh.tunnels.transport import ConnectionEvents, ConnectionInfo, ConnectRequest

PIECE = 32 * 1024
POLL_S = 0.01
ECHO_S = 3.0  # for the first echo, after the login
STOP_S = 1.0
ORDER_S = 5.0
LINE_LIMIT = 4096
SSH_FAILED = 255  # ssh's exit status when it is ssh that failed, not the command
WORDS = 40  # lines of ssh's stderr that are kept
NOBODY = "gpumesh"  # the host's name for clients of the control socket: they ask the master, never DNS


# -- arguments -------------------------------------------------------------------------------------------------------


def master_command(setup: ConnectRequest, control: Path, *, batch: bool, session: bool) -> list[str]:
    """The master's arguments. Everything that would make it ask, forward or share on its own account is off: what the
    user's ~/.ssh/config says for this host is for people."""
    ssh = setup.ssh
    options = {
        "ControlMaster": "yes",
        "ControlPath": quote_option_path(control),
        "ControlPersist": "no",
        "BatchMode": "yes" if batch else "no",
        "StrictHostKeyChecking": "accept-new" if ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW else "yes",
        "UserKnownHostsFile": quote_option_path(ssh.known_hosts.expanduser()),
        "UpdateHostKeys": "no",
        "NumberOfPasswordPrompts": "1",
        "ConnectTimeout": str(max(1, round(ssh.connect_timeout_s))),
        "ServerAliveInterval": "1",  # the last resort: 4 s. The echo is asked by our supervisor
        "ServerAliveCountMax": "3",
        "TCPKeepAlive": "yes",
        "ExitOnForwardFailure": "yes",
        "ClearAllForwardings": "yes",
        "StreamLocalBindMask": "0177",
        "StreamLocalBindUnlink": "yes",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "Tunnel": "no",
        "RequestTTY": "no",
        "EscapeChar": "none",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "LogLevel": "INFO",
        "HostName": ssh.host,
    }
    if _goes_by_its_name(setup):
        options["HostKeyAlias"] = hostkeys.host_key_alias(setup.node)
    if not ssh.agent:
        options |= {"IdentitiesOnly": "yes", "IdentityAgent": "none"}
    arguments = [argument for name, value in options.items() for argument in ("-o", f"{name}={value}")]
    for path in identity_files(ssh):
        arguments += ["-o", f"IdentityFile={quote_option_path(path)}"]
    if ssh.proxy_jump:
        arguments += ["-o", f"ProxyCommand={jump_command(ssh, batch=batch)}"]
    arguments += ["-p", str(ssh.port), "-l", ssh.user]
    if session:
        return ["ssh", *arguments, "--", ssh.alias or ssh.host, "exec cat"]
    return ["ssh", *arguments, "-N", "--", ssh.alias or ssh.host]


def jump_command(ssh: SshSpec, *, batch: bool) -> str:
    """The chain of jump hosts as a ProxyCommand. ``-J`` would not hand our known_hosts, keys and policy on to them."""
    nested = ""
    for jump in ssh.proxy_jump:
        user, _, rest = jump.rpartition("@")
        _, host, port = parse_jump(rest, "")
        options = {
            "ControlPath": "none",
            "BatchMode": "yes" if batch else "no",
            "StrictHostKeyChecking": "accept-new" if ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW else "yes",
            "UserKnownHostsFile": quote_option_path(ssh.known_hosts.expanduser()),
            "UpdateHostKeys": "no",
            "ConnectTimeout": str(max(1, round(ssh.connect_timeout_s))),
            "ClearAllForwardings": "yes",
            "ForwardAgent": "no",
            "LogLevel": "INFO",
        }
        if not ssh.agent:
            options |= {"IdentitiesOnly": "yes", "IdentityAgent": "none"}
        pairs = [*options.items(), *(("IdentityFile", quote_option_path(path)) for path in identity_files(ssh))]
        if nested:
            pairs.append(("ProxyCommand", nested))
        words = ["ssh", *(word for name, value in pairs for word in ("-o", f"{name}={value}"))]
        words += ["-l", user] if user else []
        words += ["-p", str(port)] if port != 22 else []
        # Percent signs are expanded once by the ssh that runs this: only those of -W are meant for it.
        escaped = [word.replace("%", "%%") for word in words]
        nested = shell_words([*escaped, "-W"]) + " '[%h]:%p' " + shell_words(["--", host.replace("%", "%%")])
    return nested


def identity_files(ssh: SshSpec) -> list[Path]:
    """Those that ~/.ssh/config names by a variable for an alias, ssh finds by itself."""
    paths = [path.expanduser() for path in ssh.identity_files]
    return [path for path in paths if ssh.alias is None or "${" not in str(path)]


def quote_option_path(path: Path) -> str:
    """As an option's value: ssh splits at spaces and expands percent signs. A variable it would expand as well, and its
    error would then show the value; there is no way to write one that it leaves. Raises ``KeyUnreadable``."""
    if "${" in str(path):
        raise KeyUnreadable(
            f"the path {printable(str(path))} holds ${{, which ssh would take for a variable",
            hint="give the file or its folder another name",
        )
    return '"' + str(path).replace("%", "%%") + '"'


def client_command(control: Path, *arguments: str) -> list[str]:
    """A client of the control socket. Should the master be gone, it must not connect by itself: hence ProxyCommand."""
    options = ["-o", "ControlMaster=no", "-o", f"ControlPath={quote_option_path(control)}", "-o", "ProxyCommand=false"]
    return ["ssh", "-F", "none", "-T", *options, "-o", "LogLevel=INFO", *arguments]


def _goes_by_its_name(setup: ConnectRequest) -> bool:
    """Whether ssh is to look the host's key up, and to record it, under the node's name instead of its address: where
    the node has a key of its own, and where a first key is to be recorded and nothing is known of the address. So the
    trust in a pod moves with it. Raises ``HostKeyRevoked``: ssh would not see what is revoked under the address."""
    ssh = setup.ssh
    known = hostkeys.read_known_hosts(ssh.known_hosts)
    name, address = hostkeys.host_key_alias(setup.node), hostkeys.known_hosts_address(ssh.host, ssh.port)
    own = [entry.key for entry in known.entries if not entry.marker and entry.matches(name)]
    for key in own:
        if known.check_key(key, node=setup.node, host=ssh.host, port=ssh.port).status is hostkeys.HostKeyStatus.REVOKED:
            raise HostKeyRevoked(
                f"a host key on record for {setup.node}, {key.key_type} {key.fingerprint}, is marked @revoked"
                f" in {ssh.known_hosts}",
                hint="whoever marked it knows why; remove the node's own line, or the mark",
            )
    if own:
        return True
    named = any(entry.matches(address) for entry in known.entries if entry.marker != "@revoked")
    return ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW and not named


def format_destination(ssh: SshSpec) -> str:
    return printable(ssh.alias or hostkeys.format_address(ssh.host, ssh.port))


def host_key_command(setup: ConnectRequest, known_hosts: Path, *, batch: bool) -> list[str]:
    """The arguments of an ``ssh`` that writes the host's key to ``known_hosts`` and goes, before any login."""
    ssh = setup.ssh
    options = {
        "ControlMaster": "no",
        "ControlPath": "none",
        "BatchMode": "yes" if batch else "no",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": quote_option_path(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HashKnownHosts": "no",
        "HostKeyAlias": NOBODY,
        "UpdateHostKeys": "no",
        "PreferredAuthentications": "none",
        "ConnectTimeout": str(max(1, round(ssh.connect_timeout_s))),
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "LogLevel": "INFO",
        "HostName": ssh.host,
    }
    kinds = hostkeys.read_known_hosts(ssh.known_hosts).key_types(node=setup.node, host=ssh.host, port=ssh.port)
    if kinds:
        options["HostKeyAlgorithms"] = "^" + ",".join(host_key_algorithms(kinds))
    arguments = [argument for name, value in options.items() for argument in ("-o", f"{name}={value}")]
    if ssh.proxy_jump:
        arguments += ["-o", f"ProxyCommand={jump_command(ssh, batch=batch)}"]
    return ["ssh", "-T", *arguments, "-p", str(ssh.port), "-l", ssh.user, "--", ssh.alias or ssh.host, "exit"]


async def fetch_host_key(
    node: str, ssh: SshSpec, *, secrets: tuple[tuple[str, str], ...] = (), timeout_s: float = 10.0
) -> hostkeys.HostKey:
    """The key that the host shows now, whether trusted or not; logs in to jump hosts only. Raises ``TunnelError``."""
    with private_folder() as folder:
        known_hosts = folder / "k"
        setup = ConnectRequest(node, ssh, (), secrets, control_dir=str(folder))
        deadline = Deadline(timeout_s, time.monotonic)
        async with AskpassServer(folder, dict(secrets), _Nobody(), deadline, interactive=False) as prompts:
            command = host_key_command(setup, known_hosts, batch=not prompts.can_answer)
            ssh_child = await OpensshMaster.start(
                command, folder / "c", prompts.askpass_path if prompts.can_answer else None
            )
            try:
                await asyncio.wait([ssh_child.exit_task], timeout=timeout_s)
                in_time = ssh_child.exit_task.done()
            finally:
                await ssh_child.close()
        keys = [entry.key for entry in hostkeys.read_known_hosts(known_hosts).entries]
        if keys:
            return keys[0]
        if not in_time:
            raise _too_late(ssh_child, setup)
        raise openssh_errors.error_from_stderr(ssh_child.stderr_lines, format_destination(ssh))


class _Nobody:
    """``ConnectionEvents`` of a connection that is only looked at."""

    async def ask_person(self, text: str, *, echo: bool) -> str | None:  # noqa: ARG002 - there is nobody
        return None

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        """Nothing is forwarded."""

    def report_peer_refused(self, port: int, uid: int) -> None:
        """There are no local ports."""


# -- the master ------------------------------------------------------------------------------------------------------


class OpensshMaster:
    """The ``ssh`` child. ``stderr_lines`` are the last lines of its stderr, made printable."""

    def __init__(self, process: Process, control: Path) -> None:
        self.process = process
        self.control = control
        self.stderr_lines: deque[str] = deque(maxlen=WORDS)
        self.has_session = False
        self.echo_works = False
        self.refusals = 0
        self.needs_terminal = False
        self.on_stderr_line: Callable[[str], None] = lambda _: None
        self._nonce = secrets.token_hex(8)
        self._ids = itertools.count()
        self._waiting: dict[bytes, asyncio.Future[float]] = {}
        self._readers = [asyncio.create_task(self._hear()), asyncio.create_task(self._read_echoes())]
        self.exit_task = asyncio.create_task(self._end())

    @classmethod
    async def start(cls, command: list[str], control: Path, askpass: Path | None) -> OpensshMaster:
        """Raises TransportUnsupported when there is no ``ssh``."""
        changes: dict[str, str | None] = {"SSH_ASKPASS": None, "SSH_ASKPASS_REQUIRE": "never"}
        if askpass is not None:
            # DISPLAY: ssh before 8.4 asks no program without one.
            display = environment.display() or "gpumesh:0"
            changes = {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": display}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=environment.child_environment(changes),
                start_new_session=True,  # no terminal to ask on; and one group, with its ProxyCommand
                preexec_fn=child_process.die_with_parent,  # the worker has no threads of its own yet
            )
        except OSError as error:
            message = f"ssh cannot be run: {error.strerror}"
            raise TransportUnsupported(message, hint="install OpenSSH's client, or use transport: sshtunnel") from error
        return cls(process, control)

    async def wait_until_ready(self, deadline: Deadline) -> bool:
        """True when it is logged in (its control socket is there), False when it has ended. Raises ``TimeoutError``."""
        while not self.control.exists():
            if self.exit_task.done():
                return False
            if deadline.expired:
                raise TimeoutError
            await asyncio.wait([self.exit_task], timeout=POLL_S)
        return True

    async def measure_round_trip_ms(self, timeout_s: float) -> float | None:
        """The round trip in ms of a line that the host sends back; ``None``: it does not, or not in time. It is asked
        again while no answer comes: heartbeat.py says why."""
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        asked: dict[bytes, asyncio.Future[float]] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    line = f"{self._nonce} {next(self._ids)}".encode()
                    asked[line] = self._waiting[line] = loop.create_future()
                    assert self.process.stdin is not None
                    self.process.stdin.write(line + b"\n")
                    await self.process.stdin.drain()
                    either: list[asyncio.Future[Any]] = [*asked.values(), self.exit_task]
                    await asyncio.wait(either, timeout=RESEND_S, return_when=asyncio.FIRST_COMPLETED)
                    answered = next((answer for answer in asked.values() if answer.done()), None)
                    if answered is not None or self.exit_task.done():
                        return None if answered is None else (answered.result() - began) * 1000
        except (TimeoutError, ConnectionError):
            return None
        finally:
            for line in asked:
                del self._waiting[line]

    async def close(self) -> None:
        """Ends it and all that it started. May be called twice."""
        if not self.exit_task.done():
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            await asyncio.wait([self.exit_task], timeout=STOP_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await asyncio.wait([self.exit_task], timeout=STOP_S)
        for task in (*self._readers, self.exit_task):
            task.cancel()
        await asyncio.gather(*self._readers, self.exit_task, return_exceptions=True)

    async def _end(self) -> None:
        """When it has ended and has been heard to its end."""
        await self.process.wait()
        await asyncio.wait(self._readers, timeout=STOP_S)  # a ProxyCommand left behind may hold its stderr

    async def _hear(self) -> None:
        async for line in _lines(self.process.stderr):
            text = printable(line, 300)
            if not text or set(text) == {"@"}:
                continue
            self.stderr_lines.append(text)
            self.refusals += openssh_errors.FORBIDDEN_TEXT in text
            self.on_stderr_line(text)

    async def _read_echoes(self) -> None:
        async for line in _lines(self.process.stdout):
            if line.startswith(self._nonce.encode()):
                self.echo_works = True  # however late: a login shell may take seconds to start what it was told to
            answer = self._waiting.get(line.strip())
            if answer is not None and not answer.done():
                answer.set_result(time.perf_counter())
            elif b"doesn't support PTY" in line:  # RunPod's proxy
                self.needs_terminal = True
                self.stderr_lines.append(printable(line, 300))


async def _lines(pipe: asyncio.StreamReader | None) -> AsyncIterator[bytes]:
    """Lines of a hostile stream: one that is too long is cut, not collected."""
    assert pipe is not None
    begun = b""
    while data := await pipe.read(PIECE):
        *whole, begun = (begun + data).split(b"\n")
        for line in whole:
            yield line
        begun = begun[:LINE_LIMIT]
    if begun:
        yield begun


async def log_in(setup: ConnectRequest, folder: Path, prompts: AskpassServer, deadline: Deadline) -> OpensshMaster:
    """A master that is logged in: with an echoing session where the host gives one. Raises ``TunnelError``."""
    for session in (True, False):
        control = folder / ("c" if session else "n")
        command = master_command(setup, control, batch=not prompts.can_answer, session=session)
        master = await OpensshMaster.start(command, control, prompts.askpass_path if prompts.can_answer else None)
        try:
            if await _is_usable(master, deadline, session=session):
                return master
        except BaseException as error:
            await master.close()
            if isinstance(error, TimeoutError):
                raise _too_late(master, setup) from error
            raise
        await master.close()
        refused = any(openssh_errors.NO_SESSION_PATTERN.search(word) for word in master.stderr_lines)
        if not session or (master.process.returncode == SSH_FAILED and not refused) or master.needs_terminal:
            raise openssh_errors.error_from_stderr(master.stderr_lines, format_destination(setup.ssh))
        prompts.forget_given_secrets()
    raise AssertionError("unreachable")


async def _is_usable(master: OpensshMaster, deadline: Deadline, *, session: bool) -> bool:
    """False: it has ended. Raises ``TimeoutError``."""
    if not await master.wait_until_ready(deadline):
        return False
    master.has_session = session
    if session:
        if await master.measure_round_trip_ms(min(ECHO_S, max(0.5, deadline.remaining_s))) is None:
            return not master.exit_task.done()  # a forced command that says nothing is a session all the same
        master.echo_works = True
    return True


def _too_late(master: OpensshMaster, setup: ConnectRequest) -> TunnelError:
    """What ssh has said by then is the better reason."""
    if master.stderr_lines:
        reason = openssh_errors.error_from_stderr(master.stderr_lines, format_destination(setup.ssh))
        if type(reason) is not TunnelError:
            return reason
    return ConnectTimeout(
        f"no connection to {format_destination(setup.ssh)} within {setup.ssh.connect_timeout_s:g} s",
        hint="the host is off or hung, or a firewall drops the connection",
    )


# -- the connection --------------------------------------------------------------------------------------------------


async def connect(
    setup: ConnectRequest, listeners: Sequence[socket.socket], events: ConnectionEvents
) -> OpensshConnection:
    """See ``connection.Connect``."""
    if setup.control_dir is None:
        raise TunnelError(f"there is no folder for the sockets of {setup.node}")
    folder = Path(setup.control_dir)
    if setup.ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW:
        hostkeys.ensure_known_hosts_file(setup.ssh.known_hosts)  # ssh would write into any
    deadline = Deadline(setup.ssh.connect_timeout_s, time.monotonic)
    given = dict(setup.secrets)
    async with AskpassServer(folder, given, events, deadline, interactive=setup.interactive) as prompts:
        master = await log_in(setup, folder, prompts, deadline)
    try:
        connection = OpensshConnection(setup, master, events, listeners)
    except TunnelError:
        await master.close()
        raise
    try:
        await connection.start_forwarding(folder)
    except BaseException:
        await connection.close()
        raise
    return connection


class OpensshConnection:
    """See ``connection.Connection``."""

    def __init__(
        self, setup: ConnectRequest, master: OpensshMaster, events: ConnectionEvents, listeners: Sequence[socket.socket]
    ) -> None:
        """Raises ``TunnelError``."""
        self._setup = setup
        self._listeners = listeners
        self._where = format_destination(setup.ssh)
        self._master = master
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._forwards_no_more = asyncio.Event()
        door = None if setup.share or not listeners else open_own_user_filter(listeners[0], self._peer_refused)
        self._forwarder = Forwarder(self._forwarder_ended, peer_filter=door)
        self._dialled: Target | None = None
        self._checking = True
        master.on_stderr_line = self._heard
        self.info = ConnectionInfo(None, "OpenSSH client")

    async def start_forwarding(self, folder: Path) -> None:
        """Starts forwarding. Raises ``TunnelError``, ForwardingForbidden when the host allows it to no target."""
        routes = [(folder / f"f{index}", target) for index, target in enumerate(self._setup.targets)]
        rtt_ms: float | None = None
        if routes:
            await self._forward(routes)
            rtt_ms = await self._ask_whether_allowed(routes)
        self.info = ConnectionInfo(rtt_ms or await self.ping(ECHO_S), "OpenSSH client")
        self._checking = False
        for listener, (path, target) in zip(self._listeners, routes, strict=True):
            self._forwarder.listen(listener, self._dial(path, target))
        self._forwarder.start()

    async def ping(self, timeout_s: float) -> float | None:
        if self._master.echo_works:
            return await self._master.measure_round_trip_ms(timeout_s)
        if not self._master.has_session:
            return await self._ask_for_session(timeout_s)
        ways = [
            asyncio.create_task(way(timeout_s)) for way in (self._master.measure_round_trip_ms, self._ask_for_session)
        ]
        try:
            for answered in asyncio.as_completed(ways):
                rtt_ms = await answered
                if rtt_ms is not None:
                    return rtt_ms
            return None
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _ask_for_session(self, timeout_s: float) -> float | None:
        """Where none echoes (yet) the host is asked for one: that it gives or refuses it are both signs of life."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await self._client("--", NOBODY, "exit")
        except TimeoutError:
            return None
        return None if self._master.exit_task.done() else (time.perf_counter() - began) * 1000

    async def start_command(self, command: str) -> MuxCommand:
        posix = self._master.echo_works
        process = await asyncio.create_subprocess_exec(
            *client_command(self._master.control, "--", NOBODY, wrap_killable(command) if posix else command),
            stdin=PIPE if posix else DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            env=environment.child_environment(),
        )
        return MuxCommand(process, self._master_answers)

    async def wait_lost(self) -> TunnelError:
        ended: list[asyncio.Future[Any]] = [
            self._master.exit_task,
            asyncio.ensure_future(self._forwards_no_more.wait()),
        ]
        try:
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended[1].cancel()
        if not self._master.exit_task.done():
            return TunnelLost(f"the tunnel's process for {self._where} stopped forwarding")
        return openssh_errors.error_from_stderr(self._master.stderr_lines, self._where, was_up=True)

    async def close(self) -> None:
        try:
            await blocking.run_in_thread(self._forwarder.close, STOP_S)
        finally:
            await self._master.close()

    # -- internals ---------------------------------------------------------------------------------------------------

    def _forwarder_ended(self) -> None:
        """In the selector's thread: by an error of ours, or because we close."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
            self._loop.call_soon_threadsafe(self._forwards_no_more.set)

    def _peer_refused(self, port: int, uid: int) -> None:
        """In the selector's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
            self._loop.call_soon_threadsafe(self._events.report_peer_refused, port, uid)

    async def _forward(self, routes: list[tuple[Path, Target]]) -> None:
        """Raises ``TunnelError``."""
        try:
            async with asyncio.timeout(ORDER_S):
                await openssh_mux.open_forwards(self._master.control, routes)
        except TimeoutError as error:
            raise TunnelError(f"ssh to {self._where} does not answer its control socket") from error
        except openssh_mux.MuxError as error:
            raise openssh_errors.error_from_stderr([*self._master.stderr_lines, str(error)], self._where) from error

    async def _client(self, *arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *client_command(self._master.control, *arguments),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env=environment.child_environment(),
        )
        try:
            assert process.stderr is not None
            said = b""
            while data := await process.stderr.read(PIECE):
                said = (said + data)[:PIECE]
            return await process.wait(), printable(said, 300)
        finally:
            await _end_client(process)

    async def _master_answers(self) -> bool:
        try:
            async with asyncio.timeout(ORDER_S):
                return await openssh_mux.is_master_alive(self._master.control)
        except TimeoutError:
            return False

    async def _ask_whether_allowed(self, routes: Sequence[tuple[Path, Target]]) -> float | None:
        """Which of them the host forbids is told, and raised if it is all of them. The round trip in ms, if known."""
        if not self._master.echo_works:
            return None
        # ssh names no target when it is refused. So all are asked for together, and one by one only if some are.
        refused, rtt_ms = await self._refused(routes)
        if refused == 0:
            return rtt_ms
        forbidden = [target for path, target in routes if (await self._refused([(path, target)]))[0]]
        if forbidden and len(forbidden) == len(routes):
            raise ForwardingForbidden(
                _forbids(self._where, forbidden[0]),
                hint="allow it in the host's sshd_config: AllowTcpForwarding yes (or local), and PermitOpen",
            )
        for target in forbidden:
            self._events.report_forward_failed(target, "forwarding-forbidden", _forbids(self._where, target))
        return rtt_ms

    async def _refused(self, routes: Sequence[tuple[Path, Target]]) -> tuple[int, float | None]:
        """How many of these a host that forbids forwarding has refused: one connection to each. It says so at once, and
        before our second echo (the first may overtake the requests in ssh)."""
        before = self._master.refusals
        writers: list[asyncio.StreamWriter] = []
        rtt_ms: float | None = None
        try:
            for path, _ in routes:
                writers.append((await asyncio.open_unix_connection(path))[1])
            for _ in range(2):
                rtt_ms = await self._master.measure_round_trip_ms(ECHO_S)
        finally:
            for writer in writers:
                writer.close()
        return self._master.refusals - before, rtt_ms

    def _dial(self, path: Path, target: Target) -> Dialer:
        relay = relay_to_unix(str(path))

        def dial(forwarder: Forwarder, local: socket.socket) -> None:
            self._dialled = target
            relay(forwarder, local)

        return dial

    def _heard(self, word: str) -> None:
        """ssh names no target when a channel is refused: the one that was asked for last is the likeliest."""
        target = self._dialled
        if self._checking or target is None or "open failed" not in word:
            return
        if openssh_errors.FORBIDDEN_TEXT not in word:
            message = f"nothing answers at {target.host}:{target.port} on the host"
            self._events.report_forward_failed(target, "backend-unreachable", message)
        elif len(self._setup.targets) == 1:
            self._events.report_forward_failed(target, "forwarding-forbidden", _forbids(self._where, target))


def _forbids(where: str, target: Target) -> str:
    return f"the sshd at {where} forbids forwarding to {target.host}:{target.port}"


class MuxCommand:
    """A command on the host, by a client of the master; see ``connection.RemoteCommand``. ``master_answers`` tells
    whether the master is still there."""

    def __init__(self, process: Process, master_answers: Callable[[], Awaitable[bool]]) -> None:
        self._process = process
        self._master_answers = master_answers
        self._pieces: asyncio.Queue[tuple[OutputStream, bytes] | None] = asyncio.Queue(maxsize=4)
        self._complaint = b""
        self._open = 2
        self._readers = [
            asyncio.create_task(self._pump(OutputStream.STDOUT, process.stdout)),
            asyncio.create_task(self._pump(OutputStream.STDERR, process.stderr)),
        ]

    @property
    def exit_status(self) -> int | None:
        status = self._process.returncode
        return status if status is not None and status >= 0 else None

    async def read(self) -> tuple[OutputStream, bytes] | None:
        while self._open:
            piece = await self._pieces.get()
            if piece is not None:
                return piece
            self._open -= 1
        await self._process.wait()
        if self._process.returncode == SSH_FAILED:  # which may be the command's own
            if openssh_errors.NO_SESSION_PATTERN.search(self._complaint.decode("latin-1")):
                raise ExecError(
                    "the host gives no session to run a command in",
                    hint="its sshd forbids it, or MaxSessions is reached",
                )
            if not await self._master_answers():
                raise ExecError("the connection broke while the command ran")
        return None

    async def kill(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # ``wrap_killable`` sees the end of its input
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await _end_client(self._process, patience_s=STOP_S)

    async def _pump(self, stream: OutputStream, pipe: asyncio.StreamReader | None) -> None:
        assert pipe is not None
        while data := await pipe.read(PIECE):
            if stream is OutputStream.STDERR:
                self._complaint = (self._complaint + data)[-1000:]
            await self._pieces.put((stream, data))
        await self._pieces.put(None)


async def _end_client(process: Process, patience_s: float = 0.0) -> None:
    """Kills it, unless it ends by itself within ``patience_s``."""
    if patience_s > 0.0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await wait_for_exit(process)
                return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await release_process(process, STOP_S)
