"""An SSH server that asks for a password or asks questions, for tests: OpenSSH's sshd would need PAM for that."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import paramiko

from gpumesh.topology import SshSpec
from tests.tunnels.sshd import keygen


class QuestioningServer(paramiko.ServerInterface):
    """A host that asks: OpenSSH would need PAM for that.

    ``max_keys``: it refuses so many keys in a connection, and then hangs up as sshd does (MaxAuthTries). ``banner``:
    its text before a login. ``lets_in``: the answer to a login without any proof. ``tried_keys`` has the
    fingerprints of all keys that were offered. ``service_requests`` counts the requests for the service ssh-userauth.
    """

    def __init__(
        self,
        methods: str,
        password: str,
        questions: Sequence[tuple[str, bool]],
        answers: list[str],
        *,
        max_keys: int = 100,
        banner: str = "",
        lets_in: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tried_keys: list[str] = []
        self.service_requests = 0
        self.transport: paramiko.Transport | None = None  # the newest connection
        self._keys_of_connection: tuple[paramiko.Transport | None, int] = (None, 0)
        self._max_keys = max_keys
        self._banner = banner
        self._lets_in = lets_in
        self._methods = methods
        self._password = password
        self._questions = questions
        self._answers = answers

    def get_allowed_auths(self, username: str) -> str:
        return self._methods

    def get_banner(self) -> tuple[str | None, str | None]:
        self.service_requests += 1  # paramiko asks for the banner at each of these
        return (self._banner, "en") if self._banner else (None, None)

    def check_auth_none(self, username: str) -> int:
        return paramiko.common.AUTH_SUCCESSFUL if self._lets_in() else paramiko.common.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.tried_keys.append(key.fingerprint)
        connection, count = self._keys_of_connection
        count = count + 1 if connection is self.transport else 1
        self._keys_of_connection = (self.transport, count)
        if count >= self._max_keys:
            self.hang_up("Too many authentication failures")
        return paramiko.common.AUTH_FAILED

    def hang_up(self, reason: str) -> None:
        """Ends the newest connection with these words."""
        transport = self.transport  # the client may connect again before this connection is closed
        assert transport is not None
        message = paramiko.Message()
        message.add_byte(paramiko.common.cMSG_DISCONNECT)
        message.add_int(2)
        message.add_string(reason)
        message.add_string("")
        transport._send_message(message)  # type: ignore[attr-defined]
        transport.close()

    def check_auth_password(self, username: str, password: str) -> int:
        return paramiko.common.AUTH_SUCCESSFUL if password == self._password else paramiko.common.AUTH_FAILED

    def check_auth_interactive(self, username: str, submethods: str) -> int | paramiko.server.InteractiveQuery:
        if "keyboard-interactive" not in self._methods:
            return paramiko.common.AUTH_FAILED
        return paramiko.server.InteractiveQuery("Pod", "be\x1b[31m careful", *self._questions)

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        return paramiko.common.AUTH_SUCCESSFUL if responses == self._answers else paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return False


@contextlib.asynccontextmanager
async def run_questioning_server(folder: Path, server: QuestioningServer) -> AsyncIterator[SshSpec]:
    key = paramiko.Ed25519Key.from_private_key_file(str(keygen(folder / "host")))
    transports = []

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                transport = paramiko.Transport(sock)
                transports.append(transport)
                transport.add_server_key(key)
                server.transport = transport
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=server)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = asyncio.get_running_loop().run_in_executor(None, serve, listening)
        port = listening.getsockname()[1]
        known = folder / "known_hosts"
        known.write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
        try:
            yield SshSpec("127.0.0.1", port, known_hosts=known, agent=False)
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # the thread may not outlive the test: the loop's end waits for it
            await thread
            for transport in transports:
                transport.close()
                transport.join(10)
