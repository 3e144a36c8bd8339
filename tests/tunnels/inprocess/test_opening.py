"""Opening a connection through ``connect``, against a real OpenSSH sshd: keys, trust, jump hosts, and true reasons."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from pathlib import Path

import pytest

from gpumesh.topology import HostKeyPolicy, SshSpec
from gpumesh.tunnels import known_hosts, transports
from gpumesh.tunnels.inprocess.connection import connect
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.inprocess.connecting import connect_error, connected, run_command
from tests.tunnels.polling import wait_until
from tests.tunnels.questioning_server import QuestioningServer, run_questioning_server
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, is_listening, keygen, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs_sshd]


async def test_rsa_and_ecdsa_host_keys_and_identities(tmp_path: Path) -> None:
    for kind in ("rsa", "ecdsa"):
        sshd = Sshd(tmp_path / kind)
        sshd.host_key = keygen(sshd.folder / "other_host_key", kind=kind)
        sshd.identity = keygen(sshd.folder / "other_id", kind=kind)
        sshd.authorized_keys.write_text(sshd.identity.with_suffix(".pub").read_text())
        async with sshd, connected(sshd.spec()) as (connection, _):
            assert await connection.ping(10.0) is not None


async def test_the_kind_of_key_on_record_is_asked_for(tmp_path: Path) -> None:
    """A host with two keys, of which the less preferred is known: that is no unknown host."""
    sshd = Sshd(tmp_path / "sshd")
    second = keygen(sshd.folder / "rsa_host_key", kind="rsa")
    sshd.options["HostKey"] = f"{sshd.host_key}\nHostKey {second}"
    async with sshd:
        public = " ".join(second.with_suffix(".pub").read_text().split()[:2])
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {public}\n")
        async with connected(sshd.spec()) as (connection, _):
            assert await connection.ping(10.0) is not None


async def test_wrong_key(sshd: Sshd, tmp_path: Path) -> None:
    error = await connect_error(sshd.spec(identity_files=(keygen(tmp_path / "wrong"),)))
    assert error.code == "auth-refused"
    assert "wrong" in error.message
    assert "authorized_keys" in (error.hint or "")


async def test_several_keys_and_unusable_ones(sshd: Sshd, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("no key\n")
    wrong = keygen(tmp_path / "wrong")
    files = (tmp_path / "missing", broken, wrong, sshd.identity)
    async with connected(sshd.spec(identity_files=files)) as (connection, _):
        assert await connection.ping(10.0) is not None
    assert (await connect_error(sshd.spec(identity_files=files[:1]))).code == "key-unreadable"
    assert "not a private key" in (await connect_error(sshd.spec(identity_files=files[1:2]))).message
    error = await connect_error(sshd.spec(identity_files=files[1:3]))
    assert error.code == "auth-refused"
    assert "broken" in error.message
    error = await connect_error(sshd.spec(identity_files=()))
    assert error.code == "auth-refused"
    assert "nothing" in error.message


async def test_passphrases(sshd: Sshd, tmp_path: Path) -> None:
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    with_variable = sshd.spec(identity_files=(locked,), passphrase_env="PASSPHRASE")
    async with connected(with_variable, passphrase="correct horse") as (connection, _):
        assert await connection.ping(10.0) is not None
    error = await connect_error(with_variable, passphrase="wrong")
    assert error.code == "key-unreadable"
    assert "passphrase" in error.message
    assert "wrong" not in error.message
    assert "passphrase_env" in ((await connect_error(sshd.spec(identity_files=(locked,)))).hint or "")
    assert (await connect_error(with_variable)).code == "secret-missing"


async def test_unknown_and_changed_host_key(sshd: Sshd) -> None:
    right = sshd.known_hosts.read_text()
    sshd.known_hosts.write_text("")
    error = await connect_error(sshd.spec())
    assert error.code == "host-key-unknown"
    assert "SHA256:" in error.message
    async with connected(sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW)):
        pass
    assert right.split()[2] in sshd.known_hosts.read_text()
    async with connected(sshd.spec()):  # recorded
        pass
    other = keygen(sshd.folder / "another").with_suffix(".pub").read_text()
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
    for policy in HostKeyPolicy:
        assert (await connect_error(sshd.spec(host_key_policy=policy))).code == "host-key-changed"
    sshd.known_hosts.write_text(f"@revoked * {sshd.public_host_key}\n{right}")
    assert (await connect_error(sshd.spec())).code == "host-key-revoked"


async def test_nothing_is_sent_to_a_host_that_is_not_trusted(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("")
    await connect_error(sshd.spec())
    await wait_until(lambda: "Connection closed" in sshd.log() or "Connection reset" in sshd.log(), "sshd's log")
    assert "userauth-request" not in sshd.log()


async def test_fetch_host_key_is_the_hosts(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("")
    key = await transports.fetch_host_key("iceland", sshd.spec())
    assert key.public_key_text == sshd.public_host_key


@pytest.mark.parametrize(
    ("host", "code"),
    [("gpumesh-no-such-host.invalid", "host-unresolved"), ("a..b", "host-unresolved"), ("\0", "host-unresolved")],
)
async def test_names_that_do_not_resolve(sshd: Sshd, host: str, code: str) -> None:
    assert (await connect_error(sshd.spec(host=host))).code == code


async def test_nothing_listens(sshd: Sshd) -> None:
    await sshd.stop()
    assert (await connect_error(sshd.spec())).code == "connect-refused"


@pytest.mark.parametrize(
    ("says", "code"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not-ssh"),
        (b"\x1b]0;owned\x07\x1b[2J\r\n", "not-ssh"),
        (b"A" * 100_000, "not-ssh"),
        (b"", "connect-refused"),
        (b"Exceeded MaxStartups\r\n", "connect-refused"),
        (b"SSH-1.5-old\r\n", "transport-unsupported"),
        (b"SSH-2.0-broken\r\n" + b"\xff" * 100, "tunnel-lost"),
    ],
)
async def test_servers_that_are_no_sshd(sshd: Sshd, says: bytes, code: str) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await writer.drain()

    async with serving(speak) as port:
        error = await connect_error(sshd.spec(port=port))
    assert error.code == code
    assert error.message.isprintable()
    assert len(error.message) < 300


async def test_a_silent_port_is_a_time_out(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = await connect_error(sshd.spec(port=silent.getsockname()[1], connect_timeout_s=0.3))
    assert error.code == "connect-timeout"


async def test_an_sshd_that_freezes_during_the_handshake_is_a_time_out(sshd: Sshd) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-frozen\r\n")
        await reader.read()

    async with serving(greet) as port:
        error = await connect_error(sshd.spec(port=port, connect_timeout_s=0.3))
    assert error.code == "connect-timeout"
    assert "handshake" in error.message


async def test_algorithms_that_are_too_old(tmp_path: Path) -> None:
    async with Sshd(tmp_path / "sshd", {"KexAlgorithms": "diffie-hellman-group1-sha1"}) as sshd:
        error = await connect_error(sshd.spec())
    assert error.code == "transport-unsupported"
    assert "openssh" in (error.hint or "")


async def test_cancelling_a_connect_leaves_nothing(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        setup = ConnectRequest("n", sshd.spec(port=silent.getsockname()[1], connect_timeout_s=60), ())
        task = asyncio.create_task(connect(setup, (), RecordedEvents()))
        peer, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
        with peer:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            peer.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(4096):  # its greeting, then the end
                    pass


async def test_a_password(tmp_path: Path) -> None:
    async with run_questioning_server(tmp_path, QuestioningServer("password", "hunter2", (), [])) as ssh:
        spec = SshSpec(ssh.host, ssh.port, known_hosts=ssh.known_hosts, agent=False, password_env="PW")
        async with connected(spec, password="hunter2") as (connection, _):
            assert await connection.ping(10.0) is not None
        error = await connect_error(spec, password="wrong-planted")
        assert error.code == "auth-refused"
        assert "the password" in error.message
        assert "planted" not in f"{error.message} {error.hint}"


async def test_a_password_in_answer_to_a_question(tmp_path: Path) -> None:
    server = QuestioningServer("keyboard-interactive", "", [("Password: ", False)], ["hunter2"])
    async with run_questioning_server(tmp_path, server) as ssh:
        spec = SshSpec(ssh.host, ssh.port, known_hosts=ssh.known_hosts, agent=False, password_env="PW")
        async with connected(spec, password="hunter2") as (connection, _):
            assert await connection.ping(10.0) is not None
        assert (await connect_error(spec, password="wrong")).code == "auth-refused"


async def test_questions_go_to_a_person_and_are_safe_to_print(tmp_path: Path) -> None:
    server = QuestioningServer("keyboard-interactive", "", [("Code:\x07 ", True), ("Pin: ", False)], ["123", "456"])
    async with run_questioning_server(tmp_path, server) as ssh:
        events = RecordedEvents("123", "456")
        async with connected(ssh, events=events, interactive=True) as (connection, _):
            assert await connection.ping(10.0) is not None
        assert [echo for _, echo in events.questions] == [True, False]
        assert all(text.isprintable() for text, _ in events.questions)
        assert "Code:" in events.questions[0][0]
        assert (await connect_error(ssh, events=RecordedEvents("no", "no"))).code == "auth-refused"
        assert (await connect_error(ssh, events=RecordedEvents())).code == "auth-refused"  # nobody answers


async def test_a_chain_of_jumps(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(Sshd(tmp_path / name)) for name in "abc"]
        last = hosts[-1]
        for host in hosts:
            host.authorized_keys.write_text(last.identity.with_suffix(".pub").read_text())
        last.known_hosts.write_text("".join(host.known_hosts.read_text() for host in hosts))
        jumps = tuple(f"{last.spec().user}@127.0.0.1:{host.port}" for host in hosts[:-1])
        port = await stack.enter_async_context(serving(echo))
        async with connected(last.spec(proxy_jump=jumps), port) as (connection, (local,)):
            assert await exchange(local, b"through three hosts") == b"through three hosts"
            assert (await run_command(connection, "echo $SSH_CONNECTION"))[0].split()[3] == str(last.port).encode()
        assert await transports.fetch_host_key("n", last.spec(proxy_jump=jumps)) == known_hosts.HostKey(
            "ssh-ed25519", known_hosts.parse_known_hosts("h " + last.public_host_key).entries[0].key.blob
        )
        await hosts[1].stop()
        assert "jump host" in (await connect_error(last.spec(proxy_jump=jumps))).message
        hosts[0].options["AllowTcpForwarding"] = "no"
        hosts[0].known_hosts.write_text("")
        last.known_hosts.write_text("")
        assert (await connect_error(last.spec(proxy_jump=jumps))).code == "host-key-unknown"


async def test_an_agent(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        await wait_until(lambda: is_listening(path), "the agent's socket")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        subprocess.run(["ssh-add", "-q", str(sshd.identity)], check=True, timeout=10)
        async with connected(sshd.spec(identity_files=(), agent=True)) as (connection, _):
            assert await connection.ping(10.0) is not None
        subprocess.run(["ssh-add", "-q", "-D"], check=True, timeout=10)
        subprocess.run(["ssh-add", "-q", str(keygen(tmp_path / "other"))], check=True, timeout=10)
        assert "agent" in (await connect_error(sshd.spec(identity_files=(), agent=True))).message
    finally:
        agent.kill()
        agent.wait()
