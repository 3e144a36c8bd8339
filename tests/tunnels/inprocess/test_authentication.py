"""Logins that OpenSSH's sshd alone cannot show: several factors, a host that hangs up, an agent that hangs. Ordinary
logins are in test_opening.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import paramiko
import pytest
from paramiko.common import AUTH_FAILED, AUTH_PARTIALLY_SUCCESSFUL, AUTH_SUCCESSFUL

from gpumesh.errors import AuthRefused, ConnectTimeout, KeyUnreadable, TunnelError
from gpumesh.tunnels.blocking import Deadline
from gpumesh.tunnels.inprocess import question_answerer
from gpumesh.tunnels.inprocess.authentication import Credentials, authenticate
from gpumesh.tunnels.inprocess.private_keys import load_key
from gpumesh.tunnels.inprocess.question_answerer import AskPerson
from tests.prerequisites import needs
from tests.tunnels.inprocess.connecting import connected
from tests.tunnels.polling import wait_until
from tests.tunnels.sshd import Sshd, keygen

pytestmark = needs("sshd")  # for its ssh-keygen


class Host(paramiko.ServerInterface):
    """The test gives each method's answer. ``log`` has the methods that were tried."""

    def __init__(self, allowed: str, **answers: int | Callable[[], int]) -> None:
        self._allowed = allowed
        self._answers = answers
        self.log: list[str] = []

    def _answer(self, method: str) -> int:
        self.log.append(method)
        answer = self._answers.get(method, AUTH_FAILED)
        return answer if isinstance(answer, int) else answer()

    def get_allowed_auths(self, username: str) -> str:
        return self._allowed

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return self._answer("publickey")

    def check_auth_password(self, username: str, password: str) -> int:
        return self._answer("password")

    def check_auth_interactive(self, username: str, submethods: str) -> int | paramiko.server.InteractiveQuery:
        self.log.append("interactive")
        return paramiko.server.InteractiveQuery("", "", ("Code: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int | paramiko.server.InteractiveQuery:
        if responses == ["endless"]:
            return paramiko.server.InteractiveQuery("", "", ("Again: ", False))
        return AUTH_SUCCESSFUL if responses == ["123"] else AUTH_FAILED


@contextlib.asynccontextmanager
async def transport_to(host: Host) -> AsyncIterator[tuple[paramiko.Transport, paramiko.Transport]]:
    here, there = socket.socketpair()
    server, client = paramiko.Transport(there), paramiko.Transport(here)
    server.add_server_key(paramiko.ECDSAKey.generate())
    try:
        serving = asyncio.create_task(asyncio.to_thread(server.start_server, server=host))
        await asyncio.to_thread(client.start_client, timeout=20)
        await serving
        yield client, server
    finally:
        for transport in (client, server):
            transport.close()
            await asyncio.to_thread(transport.join, 20)


async def log_in(
    transport: paramiko.Transport, credentials: Credentials, *, ask: AskPerson | None = None, timeout_s: float = 20.0
) -> None:
    deadline = Deadline(timeout_s, time.monotonic)
    await asyncio.to_thread(authenticate, transport, credentials, address="gpu", deadline=deadline, ask=ask)


def make_credentials(*identities: Path, password: str | None = None) -> Credentials:
    return Credentials("me", identities, agent=False, password=password)


# -- several factors and refusals ------------------------------------------------------------------------------------


async def test_a_login_with_two_factors(tmp_path: Path) -> None:
    """The first factor is no connect_error, and what the host asks for next is done next."""
    host = Host("publickey,keyboard-interactive", publickey=AUTH_PARTIALLY_SUCCESSFUL, password=AUTH_SUCCESSFUL)
    key = keygen(tmp_path / "id")
    async with transport_to(host) as (client, _):
        # A paramiko server has a constant list of methods. The password is not in it, so it is not tried.
        await log_in(client, make_credentials(key, password="hunter2"), ask=lambda text, echo: "123")
        assert client.is_authenticated()
    assert host.log == ["publickey", "interactive"] or host.log[-1] == "interactive"
    assert "password" not in host.log


async def test_a_refused_login_names_what_was_tried_and_what_the_host_accepts(tmp_path: Path) -> None:
    host = Host("password", publickey=AUTH_FAILED)
    key = keygen(tmp_path / "id")
    async with transport_to(host) as (client, _):
        with pytest.raises(AuthRefused) as caught:
            await log_in(client, make_credentials(key, tmp_path / "missing", password="planted-secret"))
    message, hint = caught.value.message, caught.value.hint or ""
    assert "gpu refuses the login of me" in message
    assert str(key) in message
    assert "the password" in message
    assert "missing" in message  # a key file that cannot be used is named, too
    assert "it takes password" in hint
    assert "planted-secret" not in message + hint


async def test_a_host_that_hangs_up_in_the_middle(tmp_path: Path) -> None:
    keys = [keygen(tmp_path / name) for name in ("a", "b", "c")]
    servers: list[paramiko.Transport] = []

    def hang_up() -> int:
        servers[0].close()
        return AUTH_FAILED

    host = Host("publickey", publickey=hang_up)
    async with transport_to(host) as (client, server):
        servers.append(server)
        with pytest.raises(TunnelError) as caught:
            await log_in(client, make_credentials(*keys))
    assert caught.value.code in ("auth-refused", "tunnel-lost")
    assert host.log == ["publickey"]


async def test_a_host_that_does_not_answer_the_login_times_out(tmp_path: Path) -> None:
    hold = asyncio.Event()
    loop = asyncio.get_running_loop()

    def never() -> int:
        asyncio.run_coroutine_threadsafe(hold.wait(), loop).result(30)
        return AUTH_FAILED

    host = Host("password", password=never)
    async with transport_to(host) as (client, _):
        client.auth_timeout = 0.3
        with pytest.raises(ConnectTimeout):
            await log_in(client, make_credentials(password="x"), timeout_s=0.3)
        hold.set()


async def test_the_number_of_questions_is_limited() -> None:
    host = Host("keyboard-interactive")
    asked: list[str] = []

    def answer(text: str, echo: bool) -> str:
        asked.append(text)
        return "endless"

    async with transport_to(host) as (client, _):
        with pytest.raises(TunnelError):
            await log_in(client, make_credentials(), ask=answer)
    assert len(asked) <= question_answerer.MAX_QUESTIONS


async def test_a_password_answers_one_question_only() -> None:
    host = Host("password,keyboard-interactive")
    async with transport_to(host) as (client, _):
        with pytest.raises(AuthRefused, match="answers to its questions"):
            await log_in(client, make_credentials(password="hunter2"))
    assert host.log == ["password", "interactive"]  # the host accepts either method, so each gets the password once


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
@pytest.mark.parametrize("passphrase", ["", "correct horse"])
def test_keys_of_all_kinds(tmp_path: Path, kind: str, passphrase: str) -> None:
    path = keygen(tmp_path / "id", kind=kind, passphrase=passphrase)
    key = load_key(path, passphrase or None)
    assert key.get_base64() == path.with_suffix(".pub").read_text().split()[1]
    if not passphrase:
        load_key(path, "not needed")
        return
    with pytest.raises(KeyUnreadable, match="needs a passphrase") as caught:
        load_key(path, None)
    assert "passphrase_env" in (caught.value.hint or "")
    with pytest.raises(KeyUnreadable, match="does not open with the passphrase") as caught:
        load_key(path, "planted-secret")
    assert "planted-secret" not in caught.value.message + (caught.value.hint or "")


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_text("")
    (tmp_path / "cut").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n")
    for name in ("text", "binary", "empty", "cut"):
        with pytest.raises(KeyUnreadable, match=name):
            load_key(tmp_path / name, None)
    public = keygen(tmp_path / "id").with_suffix(".pub")
    with pytest.raises(KeyUnreadable):
        load_key(public, None)  # named by mistake
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(KeyUnreadable):
            load_key(path, None)


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """The key itself is good, so the error must not blame the key."""
    path = keygen(tmp_path / "id")
    certificate = tmp_path / "id-cert.pub"
    other_type = keygen(tmp_path / "other", kind="rsa").with_suffix(".pub").read_text()
    for text in ("no certificate\n", "ssh-ed25519-cert-v01@openssh.com %%%\n", other_type):
        certificate.write_text(text)
        with pytest.raises(KeyUnreadable, match=r"certificate .*id-cert\.pub cannot be used with its key: .") as caught:
            load_key(path, None)
        assert "sign the key again" in (caught.value.hint or "")


def test_secrets_are_in_no_repr() -> None:
    shown = repr(Credentials("me", (), True, "planted-1", "planted-2"))
    assert "planted" not in shown
    assert "me" in shown


@pytest.mark.real
async def test_a_certificate_next_to_its_key_is_used(tmp_path: Path) -> None:
    """As ssh does it: the host trusts the authority, and our key is not in its authorized_keys."""
    authority = keygen(tmp_path / "ca")
    key = keygen(tmp_path / "id")
    signing = await asyncio.create_subprocess_exec(
        "ssh-keygen", "-q", "-s", str(authority), "-I", "test", "-n", "root", str(key.with_suffix(".pub"))
    )
    assert await signing.wait() == 0
    async with Sshd(tmp_path / "sshd", {"TrustedUserCAKeys": str(authority.with_suffix(".pub"))}) as sshd:
        sshd.authorized_keys.write_text("")
        async with connected(sshd.spec(identity_files=(key,), user="root")) as (connection, _):
            assert await connection.ping(10.0) is not None


# -- the agent -------------------------------------------------------------------------------------------------------


@pytest.mark.real
async def test_a_missing_or_broken_agent_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xff" * 100)
        writer.close()

    path = tmp_path / "agent"
    async with Sshd(tmp_path / "sshd") as sshd, await asyncio.start_unix_server(nonsense, path):
        for named in (path, tmp_path / "none"):
            monkeypatch.setenv("SSH_AUTH_SOCK", str(named))
            async with connected(sshd.spec(agent=True)) as (connection, _):  # by its key file
                assert await connection.ping(10.0) is not None


@pytest.mark.real
async def test_an_agent_that_hangs_is_a_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    path = tmp_path / "agent"
    async with Sshd(tmp_path / "sshd") as sshd, await asyncio.start_unix_server(hang, path):
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        with pytest.raises(ConnectTimeout):
            async with connected(sshd.spec(agent=True, identity_files=(), connect_timeout_s=0.5)):
                pass
        over.set()
        await wait_until(
            lambda: all(thread.name != "run" for thread in threading.enumerate()), "the end of the attempt"
        )
