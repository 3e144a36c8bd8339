"""An SSH server that asks for a password or asks questions, for tests: OpenSSH's sshd would need PAM for that."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import paramiko

from gpumesh.topology import SshSpec
from tests.tunnels.sshd import keygen


class QuestioningServer(paramiko.ServerInterface):
    """A host that asks: OpenSSH would need PAM for that."""

    def __init__(self, methods: str, password: str, questions: Sequence[tuple[str, bool]], answers: list[str]) -> None:
        self._methods = methods
        self._password = password
        self._questions = questions
        self._answers = answers

    def get_allowed_auths(self, username: str) -> str:
        return self._methods

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
