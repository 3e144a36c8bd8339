"""Through a worker's ``connect``, in this process, against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import paramiko
import pytest

from gpumesh.errors import ExecError, TunnelError
from gpumesh.topology import HostKeyPolicy, SshSpec, Target
from gpumesh.tunnels import hostkeys, transports
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.inprocess import channels
from gpumesh.tunnels.inprocess.connection import ParamikoConnection, connect
from gpumesh.tunnels.transport import ConnectRequest, RemoteCommand
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd, keygen, listener, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [pytest.mark.real, needs_sshd]


class Told:
    """``Events`` that are kept; ``answers`` are a person's."""

    def __init__(self, *answers: str) -> None:
        self.refused: list[tuple[Target, str]] = []
        self.questions: list[tuple[str, bool]] = []
        self.peers: list[tuple[int, int]] = []
        self._answers = list(answers)

    async def ask_person(self, text: str, *, echo: bool) -> str | None:
        self.questions.append((text, echo))
        return self._answers.pop(0) if self._answers else None

    def report_forward_failed(self, target: Target, code: str, message: str) -> None:
        assert str(target.port) in message
        self.refused.append((target, code))

    def report_peer_refused(self, port: int, uid: int) -> None:
        self.peers.append((port, uid))


@contextlib.asynccontextmanager
async def connected(
    ssh: SshSpec, *ports: int, told: Told | None = None, interactive: bool = False, **secrets: str
) -> AsyncIterator[tuple[ParamikoConnection, list[int]]]:
    """The connection, and the local port for each of ``ports`` on the host."""
    targets = tuple(Target("127.0.0.1", port) for port in ports)
    listeners = [listener() for _ in ports]
    try:
        setup = ConnectRequest("iceland", ssh, targets, tuple(secrets.items()), interactive)
        connection = await connect(setup, listeners, told or Told())
        try:
            yield connection, [one.getsockname()[1] for one in listeners]
        finally:
            await connection.close()
    finally:
        for one in listeners:
            one.close()


async def refusal(ssh: SshSpec, told: Told | None = None, **secrets: str) -> TunnelError:
    """Why it cannot be connected."""
    with pytest.raises(TunnelError) as caught:
        async with connected(ssh, 1, told=told, interactive=told is not None, **secrets):
            pass
    assert caught.value.hint
    return caught.value


async def collect(connection: ParamikoConnection, command: str) -> tuple[bytes, int | None]:
    running = await connection.start_command(command)
    output = b""
    async with asyncio.timeout(20):
        while (piece := await running.read()) is not None:
            stream, data = piece
            output += data if stream is OutputStream.STDOUT else b""
    await running.kill()
    return output, running.exit_status


async def first_output(running: RemoteCommand) -> bytes:
    """Of its standard output; an sshd that is told to debug says so on a command's standard error."""
    while piece := await running.read():
        if piece[0] is OutputStream.STDOUT:
            return piece[1]
    raise AssertionError("it said nothing")


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd") as sshd:
        yield sshd


# -- the connection --------------------------------------------------------------------------------------------------


async def test_up_ping_and_a_clean_end(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        assert connection.info.server.startswith("SSH-2.0-OpenSSH")
        assert connection.info.cipher == "aes128-gcm@openssh.com"
        assert connection.info.rtt_ms is not None
        answers = await asyncio.gather(*(connection.ping(10.0) for _ in range(5)))
        assert all(rtt_ms is not None for rtt_ms in answers)
        session = sshd.children()
        assert session
    await wait_until(lambda: not set(sshd.children()) & set(session), "sshd's session ended")


async def test_a_killed_session_is_noticed_at_once_and_a_frozen_one_by_ping(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        sshd.kill_sessions(signal.SIGSTOP)
        assert await connection.ping(0.2) is None
        assert await connection.ping(0.05) is None  # not the late answer of the one before
        sshd.kill_sessions(signal.SIGKILL)
        async with asyncio.timeout(10):
            error = await connection.wait_lost()
        assert error.code == "tunnel-lost"
        assert str(sshd.port) in error.message
        assert await connection.ping(1.0) is None
        with pytest.raises(ExecError):
            await connection.start_command("true")


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


# -- true reasons ----------------------------------------------------------------------------------------------------


async def test_wrong_key(sshd: Sshd, tmp_path: Path) -> None:
    error = await refusal(sshd.spec(identity_files=(keygen(tmp_path / "wrong"),)))
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
    assert (await refusal(sshd.spec(identity_files=files[:1]))).code == "key-unreadable"
    assert "not a private key" in (await refusal(sshd.spec(identity_files=files[1:2]))).message
    error = await refusal(sshd.spec(identity_files=files[1:3]))
    assert error.code == "auth-refused"
    assert "broken" in error.message
    error = await refusal(sshd.spec(identity_files=()))
    assert error.code == "auth-refused"
    assert "nothing" in error.message


async def test_passphrases(sshd: Sshd, tmp_path: Path) -> None:
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    with_variable = sshd.spec(identity_files=(locked,), passphrase_env="PASSPHRASE")
    async with connected(with_variable, passphrase="correct horse") as (connection, _):
        assert await connection.ping(10.0) is not None
    error = await refusal(with_variable, passphrase="wrong")
    assert error.code == "key-unreadable"
    assert "passphrase" in error.message
    assert "wrong" not in error.message
    assert "passphrase_env" in ((await refusal(sshd.spec(identity_files=(locked,)))).hint or "")
    assert (await refusal(with_variable)).code == "secret-missing"


async def test_unknown_and_changed_host_key(sshd: Sshd) -> None:
    right = sshd.known_hosts.read_text()
    sshd.known_hosts.write_text("")
    error = await refusal(sshd.spec())
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
        assert (await refusal(sshd.spec(host_key_policy=policy))).code == "host-key-changed"
    sshd.known_hosts.write_text(f"@revoked * {sshd.public_host_key}\n{right}")
    assert (await refusal(sshd.spec())).code == "host-key-revoked"


async def test_nothing_is_sent_to_a_host_that_is_not_trusted(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("")
    await refusal(sshd.spec())
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
    assert (await refusal(sshd.spec(host=host))).code == code


async def test_nothing_listens(sshd: Sshd) -> None:
    await sshd.stop()
    assert (await refusal(sshd.spec())).code == "connect-refused"


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
async def test_what_listens_is_no_sshd(sshd: Sshd, says: bytes, code: str) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await writer.drain()

    async with serving(speak) as port:
        error = await refusal(sshd.spec(port=port))
    assert error.code == code
    assert error.message.isprintable()
    assert len(error.message) < 300


async def test_a_silent_port_is_a_time_out(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = await refusal(sshd.spec(port=silent.getsockname()[1], connect_timeout_s=0.3))
    assert error.code == "connect-timeout"


async def test_an_sshd_that_freezes_during_the_handshake_is_a_time_out(sshd: Sshd) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-frozen\r\n")
        await reader.read()

    async with serving(greet) as port:
        error = await refusal(sshd.spec(port=port, connect_timeout_s=0.3))
    assert error.code == "connect-timeout"
    assert "handshake" in error.message


async def test_algorithms_that_are_too_old(tmp_path: Path) -> None:
    async with Sshd(tmp_path / "sshd", {"KexAlgorithms": "diffie-hellman-group1-sha1"}) as sshd:
        error = await refusal(sshd.spec())
    assert error.code == "transport-unsupported"
    assert "openssh" in (error.hint or "")


async def test_other_ciphers_work_where_gcm_is_not_offered(tmp_path: Path) -> None:
    async with (
        Sshd(tmp_path / "sshd", {"Ciphers": "aes256-ctr", "MACs": "hmac-sha2-256-etm@openssh.com"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port) as (connection, (local,)),
    ):
        assert connection.info.cipher == "aes256-ctr"
        assert await exchange(local, b"x" * 300_000) == b"x" * 300_000


async def test_cancelling_a_connect_leaves_nothing(sshd: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        setup = ConnectRequest("n", sshd.spec(port=silent.getsockname()[1], connect_timeout_s=60), ())
        task = asyncio.create_task(connect(setup, (), Told()))
        peer, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
        with peer:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            peer.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(4096):  # its greeting, then the end
                    pass


# -- questions -------------------------------------------------------------------------------------------------------


class Asking(paramiko.ServerInterface):
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
async def asking(folder: Path, server: Asking) -> AsyncIterator[SshSpec]:
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


async def test_a_password(tmp_path: Path) -> None:
    async with asking(tmp_path, Asking("password", "hunter2", (), [])) as ssh:
        spec = SshSpec(ssh.host, ssh.port, known_hosts=ssh.known_hosts, agent=False, password_env="PW")
        async with connected(spec, password="hunter2") as (connection, _):
            assert await connection.ping(10.0) is not None
        error = await refusal(spec, password="wrong-planted")
        assert error.code == "auth-refused"
        assert "the password" in error.message
        assert "planted" not in f"{error.message} {error.hint}"


async def test_a_password_in_answer_to_a_question(tmp_path: Path) -> None:
    server = Asking("keyboard-interactive", "", [("Password: ", False)], ["hunter2"])
    async with asking(tmp_path, server) as ssh:
        spec = SshSpec(ssh.host, ssh.port, known_hosts=ssh.known_hosts, agent=False, password_env="PW")
        async with connected(spec, password="hunter2") as (connection, _):
            assert await connection.ping(10.0) is not None
        assert (await refusal(spec, password="wrong")).code == "auth-refused"


async def test_questions_go_to_a_person_and_are_safe_to_print(tmp_path: Path) -> None:
    server = Asking("keyboard-interactive", "", [("Code:\x07 ", True), ("Pin: ", False)], ["123", "456"])
    async with asking(tmp_path, server) as ssh:
        told = Told("123", "456")
        async with connected(ssh, told=told, interactive=True) as (connection, _):
            assert await connection.ping(10.0) is not None
        assert [echo for _, echo in told.questions] == [True, False]
        assert all(text.isprintable() for text, _ in told.questions)
        assert "Code:" in told.questions[0][0]
        assert (await refusal(ssh, told=Told("no", "no"))).code == "auth-refused"
        assert (await refusal(ssh, told=Told())).code == "auth-refused"  # nobody answers


# -- jumps -----------------------------------------------------------------------------------------------------------


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
            assert (await collect(connection, "echo $SSH_CONNECTION"))[0].split()[3] == str(last.port).encode()
        assert await transports.fetch_host_key("n", last.spec(proxy_jump=jumps)) == hostkeys.HostKey(
            "ssh-ed25519", hostkeys.parse_known_hosts("h " + last.public_host_key).entries[0].key.blob
        )
        await hosts[1].stop()
        assert "jump host" in (await refusal(last.spec(proxy_jump=jumps))).message
        hosts[0].options["AllowTcpForwarding"] = "no"
        hosts[0].known_hosts.write_text("")
        last.known_hosts.write_text("")
        assert (await refusal(last.spec(proxy_jump=jumps))).code == "host-key-unknown"


# -- forwarding ------------------------------------------------------------------------------------------------------


async def test_several_targets_each_to_its_own(sshd: Sshd) -> None:
    async def name(letter: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(letter)

    async with (
        serving(lambda _, writer: name(b"a", writer)) as a,
        serving(lambda _, writer: name(b"b", writer)) as b,
        connected(sshd.spec(), a, b) as (_, (to_a, to_b)),
    ):
        assert await exchange(to_a, b"") == b"a"
        assert await exchange(to_b, b"") == b"b"


async def test_forwarding_forbidden_and_a_target_that_is_not_there(tmp_path: Path) -> None:
    told = Told()
    async with (
        Sshd(tmp_path / "sshd", {"AllowTcpForwarding": "no"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port, told=told) as (connection, (local,)),
    ):
        with pytest.raises(ConnectionResetError):
            await exchange(local, b"x")
        await wait_until(lambda: bool(told.refused), "the refusal told")
        assert told.refused == [(Target("127.0.0.1", port), "forwarding-forbidden")]
        assert await connection.ping(10.0) is not None
    told = Told()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with (
        Sshd(tmp_path / "other", {"PermitOpen": f"127.0.0.1:{port}"}) as sshd,
        connected(sshd.spec(), port, 9, told=told) as (_, (local, forbidden)),
    ):
        for one in (local, forbidden):
            with pytest.raises(ConnectionResetError):
                await exchange(one, b"x")
        await wait_until(lambda: len(told.refused) == 2, "both refusals told")
        assert [code for _, code in told.refused] == ["backend-unreachable", "forwarding-forbidden"]


async def test_traffic_goes_on_while_the_host_changes_keys(tmp_path: Path) -> None:
    async with (
        Sshd(tmp_path / "sshd", {"RekeyLimit": "1M", "LogLevel": "DEBUG1"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port) as (connection, (local,)),
    ):
        data = [bytes([number]) * 2_000_000 for number in range(6)]
        assert await asyncio.gather(*(exchange(local, one) for one in data)) == data
        assert await connection.ping(10.0) is not None
        assert sshd.log().count("SSH2_MSG_NEWKEYS received") > 3


async def test_a_lost_connection_resets_its_clients(sshd: Sshd) -> None:
    """Not an ordinary end: half an answer must not look whole."""
    async with serving(echo) as port, connected(sshd.spec(), port) as (connection, (local,)):
        reader, writer = await asyncio.open_connection("127.0.0.1", local)
        writer.write(b"half")
        assert await reader.readexactly(4) == b"half"
        sshd.kill_sessions()
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await connection.wait_lost()
        writer.close()


async def test_clients_wait_for_the_connection_instead_of_being_refused(sshd: Sshd) -> None:
    async with serving(echo) as port:
        with listener() as local:
            early = asyncio.create_task(exchange(local.getsockname()[1], b"early"))
            setup = ConnectRequest("n", sshd.spec(), (Target("127.0.0.1", port),))
            first = await connect(setup, [local], Told())
            assert await early == b"early"
            await first.close()
            between = asyncio.create_task(exchange(local.getsockname()[1], b"between"))
            second = await connect(setup, [local], Told())
            assert await between == b"between"
            await second.close()


async def test_without_the_private_parts_of_paramiko_sshtunnel_forwards(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "find_missing_feature", lambda _: "for this test")
    async with serving(echo) as port, connected(sshd.spec(), port) as (connection, (local,)):
        answers = await asyncio.gather(*(exchange(local, b"%d" % number) for number in range(40)))
        assert answers == [b"%d" % number for number in range(40)]
        reader, writer = await asyncio.open_connection("127.0.0.1", local)
        writer.write(b"x")
        await reader.readexactly(1)
        writer.close()
        assert await connection.ping(10.0) is not None


def test_paramiko_is_as_channels_py_expects_it() -> None:
    """Fails loudly when a new paramiko changes what is used of its private parts: then read channels.py against it."""
    here, there = socket.socketpair()
    with here, there:
        transport = paramiko.Transport(here)
        assert channels.find_missing_feature(transport) is None
        table = transport._channel_handler_table  # type: ignore[attr-defined]
        transport._channel_handler_table = {**table, 255: None}  # type: ignore[attr-defined]
        assert "_channel_handler_table" in (channels.find_missing_feature(transport) or "")
    loop = inspect.getsource(paramiko.Transport.run)
    assert "self._channel_handler_table[ptype](chan, m)" in loop
    assert "self._handler_table[ptype](m)" in loop
    assert "chan._unlink()" in loop
    opened = inspect.getsource(paramiko.Transport._parse_channel_open_success)  # type: ignore[attr-defined]
    assert "chan._set_remote_channel(" in opened
    opening = inspect.getsource(paramiko.Transport.open_channel)
    for step in ("self._next_channel()", "self._channels.put(chanid, chan)", "self.channels_seen[chanid] = True"):
        assert step in opening
    major = int(paramiko.__version__.split(".")[0])
    assert 4 <= major < 6, "pyproject.toml pins the range that was tried"


# -- commands --------------------------------------------------------------------------------------------------------


async def test_output_status_and_standard_error(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        assert await collect(connection, "sh -c 'printf hello; exit 3'") == (b"hello", 3)
        assert await collect(connection, "sh -c 'cat; echo over'") == (b"over\n", 0)  # its input is at its end
        assert await collect(connection, "sh -c 'kill -9 $$'") == (b"", 137)
        output, status = await collect(connection, "head -c 3000000 /dev/zero")
        assert len(output) == 3_000_000
        assert status == 0
        many = await asyncio.gather(*(collect(connection, f"echo {number}") for number in range(6)))
        assert [output for output, _ in many] == [b"%d\n" % number for number in range(6)]


async def test_kill_ends_the_command_on_the_host(sshd: Sshd, tmp_path: Path) -> None:
    async with connected(sshd.spec()) as (connection, _):
        running = await connection.start_command("sh -c 'sleep 600 & echo $$ $!; wait'")
        pids = [int(pid) for pid in (await first_output(running)).split()]
        await running.kill()
        await running.kill()
        await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")
        assert await connection.ping(10.0) is not None


async def test_a_lost_connection_ends_its_commands_on_the_host(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        running = await connection.start_command("sh -c 'sleep 600 & echo $$ $!; wait'")
        pids = [int(pid) for pid in (await first_output(running)).split()]
        connection._transport.sock.close()
        await connection.wait_lost()
    await wait_until(lambda: not any(alive(pid) for pid in pids), f"the end of {pids}")


async def test_a_host_without_a_posix_shell_gets_commands_as_they_are(tmp_path: Path) -> None:
    """As Windows' cmd.exe would: it does not know ``exec``, and says so to everything."""
    said = tmp_path / "asked"
    forced = f"/bin/sh -c 'echo \"$SSH_ORIGINAL_COMMAND\" >> {said}; echo unknown'"
    async with (
        Sshd(tmp_path / "sshd", {"ForceCommand": forced}) as sshd,
        connected(sshd.spec()) as (connection, _),
    ):
        assert await collect(connection, "nvidia-smi -L") == (b"unknown\n", 0)
        running = await connection.start_command("anything")
        await running.kill()
    assert "nvidia-smi -L" in said.read_text().splitlines()


async def test_a_command_that_is_not_read_does_not_fill_memory(sshd: Sshd) -> None:
    async with connected(sshd.spec()) as (connection, _):
        running = await connection.start_command("head -c 100000000 /dev/zero")
        await running.read()
        channel = running._channel  # type: ignore[attr-defined]
        await connection.ping(10.0)
        await connection.ping(10.0)
        assert len(channel.in_buffer) <= 4 << 20
        await running.kill()


async def test_sessions_that_the_host_refuses(tmp_path: Path) -> None:
    async with (
        Sshd(tmp_path / "sshd", {"MaxSessions": "0"}) as sshd,
        serving(echo) as port,
        connected(sshd.spec(), port) as (connection, (local,)),
    ):
        with pytest.raises(ExecError):
            await connection.start_command("true")
        assert await exchange(local, b"forwarding works all the same") == b"forwarding works all the same"


async def test_an_agent(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        await wait_until(path.exists, "the agent's socket")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        subprocess.run(["ssh-add", "-q", str(sshd.identity)], check=True, timeout=10)
        async with connected(sshd.spec(identity_files=(), agent=True)) as (connection, _):
            assert await connection.ping(10.0) is not None
        subprocess.run(["ssh-add", "-q", "-D"], check=True, timeout=10)
        subprocess.run(["ssh-add", "-q", str(keygen(tmp_path / "other"))], check=True, timeout=10)
        assert "agent" in (await refusal(sshd.spec(identity_files=(), agent=True))).message
    finally:
        agent.kill()
        agent.wait()
