"""How a login goes, on both transports, against real servers and a real agent: as stock ssh does it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import getpass
import subprocess
import threading
from pathlib import Path

import pytest

from gpumesh.errors import AuthRefused, ExecError
from gpumesh.topology import TransportKind
from gpumesh.tunnels.transport import ConnectFunction, ConnectRequest
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.logging_in import get_refusal, log_in, read_spec
from tests.tunnels.questioning_server import QuestioningServer, run_questioning_server
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, keygen, run_agent, serving
from tests.tunnels.supervised import supervised

pytestmark = [pytest.mark.real, needs("sshd", "ssh")]


# -- keys ------------------------------------------------------------------------------------------------------------


async def test_a_public_key_file_means_the_key_of_the_agent(
    connect: ConnectFunction,
    transport: TransportKind,
    sshd: Sshd,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with 1Password or a YubiKey: no private key lies in a file. Other keys of the agent are not tried."""
    sshd.options["MaxAuthTries"] = "2"
    await sshd.stop()
    await sshd.start()
    others = [keygen(tmp_path / f"other{number}") for number in range(6)]
    public = sshd.identity.with_suffix(".pub")
    with run_agent(tmp_path, *others, sshd.identity) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        sshd.identity.unlink()
        ssh = sshd.spec(agent=True, identity_files=(public,), identities_only=True)
        await log_in(connect, ssh, folder)
        await log_in(connect, dataclasses.replace(ssh, identities_only=False), folder)
        other = others[0].with_suffix(".pub")
        refusal = await get_refusal(connect, dataclasses.replace(ssh, identity_files=(other,)), folder)
        assert refusal.code == "auth-refused"
    refusal = await get_refusal(connect, ssh, folder)
    if transport is TransportKind.SSHTUNNEL:
        assert refusal.code == "key-unreadable"
        assert "is a public key, and no agent here has its private key" in refusal.message


async def test_the_key_of_an_encrypted_file_may_be_in_the_agent(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_agent(tmp_path, sshd.identity) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "correct horse", "-f", str(sshd.identity)]
        subprocess.run(change, check=True, timeout=20)
        sshd.identity.with_suffix(".pub").unlink()  # the file has the public key in the clear
        await log_in(connect, sshd.spec(agent=True, identities_only=True), folder)


async def test_a_person_is_asked_for_the_passphrase_of_a_key(
    connect: ConnectFunction, sshd: Sshd, folder: Path
) -> None:
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "correct horse", "-f", str(sshd.identity)]
    subprocess.run(change, check=True, timeout=20)
    person = RecordedEvents("correct horse")
    await log_in(connect, sshd.spec(), folder, person=person)
    [(question, echo)] = person.questions
    assert "passphrase for key" in question
    assert str(sshd.identity) in question
    assert not echo


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
async def test_a_key_in_pkcs8(kind: str, connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    """As openssl and many web consoles write them."""
    key = keygen(tmp_path / "id", kind=kind)
    sshd.authorized_keys.write_text(key.with_suffix(".pub").read_text())
    for passphrase in ("", "correct horse"):
        change = ["ssh-keygen", "-q", "-p", "-m", "PKCS8", "-P", "", "-N", passphrase, "-f", str(key)]
        subprocess.run(change, check=True, timeout=20)
        await log_in(connect, sshd.spec(identity_files=(key,)), folder, passphrase=passphrase or "not needed")
    assert b"ENCRYPTED" in key.read_bytes()
    refusal = await get_refusal(connect, sshd.spec(identity_files=(key,)), folder, passphrase="planted-secret")
    assert refusal.code in ("key-unreadable", "auth-refused")
    assert "planted" not in f"{refusal.message} {refusal.hint}"


async def test_only_named_keys_are_tried_if_the_alias_says_so(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_agent(tmp_path, sshd.identity) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        ssh = sshd.spec(agent=True, identity_files=(keygen(tmp_path / "wrong"),))
        await log_in(connect, ssh, folder)
        refusal = await get_refusal(connect, dataclasses.replace(ssh, identities_only=True), folder)
        assert refusal.code == "auth-refused"


async def test_a_named_key_is_tried_although_the_agent_has_too_many(
    connect: ConnectFunction, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock ssh offers the keys of the agent first, and sshd hangs up after MaxAuthTries (6)."""
    with run_agent(tmp_path, *(keygen(tmp_path / f"other{number}") for number in range(7))) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        await log_in(connect, sshd.spec(agent=True), folder)


@pytest.mark.parametrize("max_tries", [6, 3])
async def test_keys_leave_a_try_for_the_password(
    max_tries: int, connect: ConnectFunction, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = QuestioningServer("publickey,password", "hunter2", (), [], max_keys=max_tries)
    keys = [keygen(tmp_path / f"other{number}") for number in range(5)]
    with run_agent(tmp_path, *keys) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        async with run_questioning_server(tmp_path, server) as server_spec:
            ssh = dataclasses.replace(
                server_spec, agent=True, identity_files=(keygen(tmp_path / "file"),), password_env="PASSWORD"
            )
            await log_in(connect, ssh, folder, password="hunter2")
            refusal = await get_refusal(connect, ssh, folder, password="planted-secret")
    assert refusal.code == "auth-refused"


async def test_a_host_is_asked_once_for_the_service(connect: ConnectFunction, folder: Path, tmp_path: Path) -> None:
    """A round trip each time. This server gives no session, so transport openssh connects twice."""
    server = QuestioningServer("publickey,password", "hunter2", (), [])
    keys = tuple(keygen(tmp_path / f"key{number}") for number in range(2))
    async with run_questioning_server(tmp_path, server) as ssh:
        named = dataclasses.replace(ssh, identity_files=keys, password_env="PASSWORD")
        await log_in(connect, named, folder, password="hunter2")
    assert server.service_requests <= 2
    assert len(set(server.tried_keys)) == 2


@pytest.mark.parametrize("user_in_file", [True, False])
async def test_tokens_and_variables_in_the_key_files_of_an_alias(
    user_in_file: bool,
    connect: ConnectFunction,
    transport: TransportKind,
    sshd: Sshd,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From mesh.yaml to the login. The user of mesh.yaml is the %r, also if the alias has another."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOGNAME", getpass.getuser())
    monkeypatch.setenv("KEY_FOLDER", "keys")
    user = getpass.getuser()
    (tmp_path / "keys").mkdir()
    sshd.identity.rename(tmp_path / "keys" / f"{user}@127.0.0.1-{sshd.port}-{user}-gpu%")
    (tmp_path / ".ssh").mkdir(mode=0o700)
    user_line = f"User {user}" if user_in_file else "User somebody-else"
    own_user = "" if user_in_file else f", user: {user}"
    ssh = read_spec(
        tmp_path,
        f"{{alias: gpu, transport: {transport}{own_user}}}",
        f"Host gpu\n  HostName 127.0.0.1\n  Port {sshd.port}\n  {user_line}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {sshd.known_hosts}\n  IdentityFile %d/${{KEY_FOLDER}}/%r@%h-%p-%u-%n%%\n",
    )
    assert ssh.identities_only
    monkeypatch.setattr(Path, "home", classmethod(lambda _cls: tmp_path))
    await log_in(connect, ssh, folder)


# -- what the host says ----------------------------------------------------------------------------------------------


async def test_a_host_that_lets_in_without_proof(connect: ConnectFunction, folder: Path, tmp_path: Path) -> None:
    """As Tailscale's SSH does: the network has proved already who we are."""
    server = QuestioningServer("publickey", "", (), [], lets_in=lambda: True)
    async with run_questioning_server(tmp_path, server) as ssh:
        await log_in(connect, dataclasses.replace(ssh, identity_files=(keygen(tmp_path / "id"),)), folder)
    assert server.tried_keys == []


BANNER = (
    "\x1b[31m" + "*" * 40 + "\r\n" + "Only for staff. " * 30 + "\r\n"
    "# To authenticate, visit: https://login.tailscale.com/a/1234567890\r\n"
)


async def test_the_banner_of_a_host_that_refuses(connect: ConnectFunction, folder: Path, tmp_path: Path) -> None:
    server = QuestioningServer("publickey", "", (), [], banner=BANNER)
    async with run_questioning_server(tmp_path, server) as ssh:
        refusal = await get_refusal(
            connect, dataclasses.replace(ssh, identity_files=(keygen(tmp_path / "id"),)), folder
        )
    assert isinstance(refusal, AuthRefused)
    assert "it says: To authenticate, visit: https://login.tailscale.com/a/1234567890 Only for" in refusal.message
    assert refusal.message.isprintable()
    assert len(refusal.message) < 700


async def test_a_login_that_waits_for_a_person_elsewhere(
    connect: ConnectFunction, folder: Path, tmp_path: Path
) -> None:
    """As Tailscale's check mode: the banner names a page, and the host does not answer before somebody was there."""
    visited = threading.Event()
    server = QuestioningServer("publickey", "", (), [], banner=BANNER, lets_in=lambda: visited.wait(60))
    async with run_questioning_server(tmp_path, server) as ssh:
        impatient = dataclasses.replace(ssh, connect_timeout_s=1.0)
        try:
            refusal = await get_refusal(connect, impatient, folder)
        finally:
            visited.set()
        assert refusal.needs_person
        assert "has not accepted the login of root within 1 s; it says: To auth" in refusal.message
        assert "https://login.tailscale.com/a/1234567890" in refusal.message
        await log_in(connect, ssh, folder)


async def test_a_banner_is_no_message_of_ssh_itself(connect: ConnectFunction, folder: Path, tmp_path: Path) -> None:
    """It would be told as a changed host key, or as forwarding that is forbidden."""
    banner = "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\r\nadministratively prohibited: connection refused\r\n"
    server = QuestioningServer("publickey", "", (), [], banner=banner)
    async with run_questioning_server(tmp_path, server) as ssh:
        refusal = await get_refusal(
            connect, dataclasses.replace(ssh, identity_files=(keygen(tmp_path / "id"),)), folder
        )
    assert refusal.code == "auth-refused"
    assert "REMOTE HOST IDENTIFICATION" in refusal.message


async def test_why_a_host_hangs_up(connect: ConnectFunction, folder: Path, tmp_path: Path) -> None:
    server = QuestioningServer("publickey", "", (), [], max_keys=1)
    async with run_questioning_server(tmp_path, server) as ssh:
        refusal = await get_refusal(
            connect, dataclasses.replace(ssh, identity_files=(keygen(tmp_path / "id"),)), folder
        )
    assert "Too many authentication failures" in refusal.message


@pytest.mark.parametrize(
    ("greeting", "code", "text"),
    [
        (b"Not allowed at this time\r\n", "connect-refused", "Not allowed at this time"),
        (b"Exceeded MaxStartups\r\n", "connect-refused", "MaxStartups"),
        (b"Your pod is \x1b[1mstarting\x07\r\n", "not-ssh", "Your pod is starting"),
    ],
)
async def test_a_host_that_says_something_else_than_a_greeting(
    greeting: bytes, code: str, text: str, connect: ConnectFunction, sshd: Sshd, folder: Path
) -> None:
    async def refuse(_: object, writer: object) -> None:
        writer.write(greeting)  # type: ignore[attr-defined]
        await writer.drain()  # type: ignore[attr-defined]

    async with serving(refuse) as port:
        refusal = await get_refusal(connect, sshd.spec(port=port), folder)
    assert refusal.code == code
    assert text in refusal.message
    assert refusal.message.isprintable()


async def test_why_a_host_ends_a_connection(connect: ConnectFunction, folder: Path, tmp_path: Path) -> None:
    server = QuestioningServer("publickey", "", (), [], banner="welcome\r\n", lets_in=lambda: True)
    async with run_questioning_server(tmp_path, server) as ssh:
        connection = await connect(ConnectRequest("n", ssh, (), control_dir=str(folder)), (), RecordedEvents())
        try:
            server.hang_up("going down for \x1b[1mmaintenance")
            lost = await asyncio.wait_for(connection.wait_lost(), 20)
        finally:
            await connection.close()
    assert lost.code == "tunnel-lost"
    assert "going down for " in lost.message
    assert "maintenance" in lost.message
    assert "welcome" not in lost.message  # that was said at the login
    assert lost.message.isprintable()


@pytest.mark.parametrize("max_sessions", ["0", "1"])
async def test_why_a_host_gives_no_session(
    max_sessions: str, transport: TransportKind, pool: WorkerPool, sshd: Sshd, runtime: Path
) -> None:
    await sshd.stop()
    sshd.options["MaxSessions"] = max_sessions
    await sshd.start()
    async with supervised(pool, sshd.spec(transport=transport), 1) as watched:
        await watched.tunnel.wait_up()
        hold = contextlib.AsyncExitStack()
        async with hold:
            if max_sessions == "1" and transport is TransportKind.SSHTUNNEL:
                chunks = watched.tunnel.exec_stream(["sh", "-c", "echo started; sleep 600"])
                await hold.enter_async_context(contextlib.aclosing(chunks))  # type: ignore[type-var]
                await anext(aiter(chunks))
            with pytest.raises(
                ExecError, match=r"gives no session to run a command in .*(?i:open failed|refused)"
            ) as caught:
                await watched.tunnel.exec(["true"], timeout_s=20)
    assert caught.value.hint == "its sshd forbids it, or MaxSessions is reached"
