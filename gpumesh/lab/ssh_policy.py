"""What a client of a simulated host's SSH server may do: log in, forward ports, run commands."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_UNKNOWN_CHANNEL_TYPE,
    OPEN_SUCCEEDED,
)

from gpumesh.lab.profile import Faults
from gpumesh.lab.reverse_ports import LOOPBACK_NAMES, ReversePorts
from gpumesh.lab.shell import SimShell


class PolicyServer(Protocol):
    """The part of ``SshServer`` that says what its clients may do; see there."""

    @property
    def shell(self) -> SimShell: ...

    @property
    def faults(self) -> Callable[[], Faults]: ...

    @property
    def authorized(self) -> Collection[bytes]: ...


class PolicyConnection(Protocol):
    """The part of a client's ``Connection`` that does what was allowed; see there."""

    @property
    def server(self) -> PolicyServer: ...

    @property
    def reverse_ports(self) -> ReversePorts: ...

    def open_target(self, channel_id: int, host: str, port: int) -> int: ...

    def command_requested(self, channel: paramiko.Channel, command: str) -> None: ...


class ClientPolicy(paramiko.ServerInterface):
    """Decides what the client may do. paramiko calls these methods, in its own thread."""

    def __init__(self, connection: PolicyConnection) -> None:
        self._connection = connection
        self._server = connection.server

    def get_allowed_auths(self, username: str) -> str:
        """The methods to log in, separated by commas. A password is possible only if the host has a password."""
        del username
        return "publickey,password" if self._server.shell.profile.password is not None else "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        """Accepts the host's user with an authorized key. paramiko itself checks the client's signature.

        The fault ``ssh_refuse_key`` refuses every key.
        """
        if self._server.faults().ssh_refuse_key:
            return AUTH_FAILED
        is_authorized = username == self._server.shell.profile.user and key.asbytes() in self._server.authorized
        return AUTH_SUCCESSFUL if is_authorized else AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:
        profile = self._server.shell.profile
        is_correct = profile.password is not None and username == profile.user and password == profile.password
        return AUTH_SUCCESSFUL if is_correct else AUTH_FAILED

    def check_global_request(self, kind: str, msg: paramiko.Message) -> bool:
        """Answers keepalives, and refuses all else. For remote port forwarding, paramiko calls the methods below."""
        del msg
        return kind == "keepalive@openssh.com"

    def check_port_forward_request(self, address: str, port: int) -> int | bool:
        """Lets the client have the host listen at ``port``, at its loopback only. False: the port is not free."""
        is_allowed = address in LOOPBACK_NAMES and not self._server.faults().ssh_no_forwarding
        return port if is_allowed and self._connection.reverse_ports.add(port) else False

    def cancel_port_forward_request(self, address: str, port: int) -> None:
        del address
        self._connection.reverse_ports.remove(port)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        """Accepts sessions, unless the faults refuse them. Returns SSH's code for success or the failure.

        For a direct-tcpip channel, paramiko calls ``check_channel_direct_tcpip_request`` instead.
        """
        del chanid
        if kind != "session":
            return OPEN_FAILED_UNKNOWN_CHANNEL_TYPE
        if self._server.faults().ssh_no_session:
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        return OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        """Opens the target of a port forwarding. ``destination`` is its host and port as the client names them."""
        del origin
        host, port = destination
        return self._connection.open_target(chanid, host, port)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        """Accepts each command. An unknown command fails later, as with a real shell."""
        self._connection.command_requested(channel, command.decode("utf-8", "replace"))
        return True

    def check_channel_pty_request(
        self, channel: paramiko.Channel, term: bytes, width: int, height: int, pixelwidth: int, pixelheight: int,
        modes: bytes,
    ) -> bool:  # fmt: skip
        """Accepts a terminal, which changes nothing for the simulated commands."""
        del channel, term, width, height, pixelwidth, pixelheight, modes
        return True
