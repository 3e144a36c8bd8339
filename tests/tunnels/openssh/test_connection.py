"""Through a worker's ``connect``, in this process, with the system's ssh against a real OpenSSH sshd."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.errors import ExecError, TunnelError
from gpumesh.topology import HostKeyPolicy, SshSpec, Target, TransportKind
from gpumesh.tunnels import hostkeys
from gpumesh.tunnels.base import OutputStream
from gpumesh.tunnels.openssh.connection import OpensshConnection, connect, master_command
from gpumesh.tunnels.transport import ConnectRequest
from tests.tunnels.inprocess.test_connection import Asking, Told, asking
from tests.tunnels.inprocess.test_connection import refusal as sshtunnel_refusal
from tests.tunnels.polling import alive, wait_until
from tests.tunnels.sshd import Sshd, keygen, listener, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

real = [pytest.mark.real, needs_sshd, pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh")]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s")
    path.chmod(0o700)
    return path


def make_setup(ssh: SshSpec, folder: Path, *ports: int, interactive: bool = False, **secrets: str) -> ConnectRequest:
    targets = tuple(Target("127.0.0.1", port) for port in ports)
    return ConnectRequest("iceland", ssh, targets, tuple(secrets.items()), interactive, str(folder))


@contextlib.asynccontextmanager
async def connected(
    ssh: SshSpec, folder: Path, *ports: int, told: Asked | None = None, **secrets: str
) -> AsyncIterator[tuple[OpensshConnection, list[int]]]:
    listeners = [listener() for _ in ports]
    try:
        setup = make_setup(ssh, folder, *ports, interactive=told is not None and told.person, **secrets)
        connection = await connect(setup, listeners, told or Asked())
        try:
            yield connection, [one.getsockname()[1] for one in listeners]
        finally:
            await connection.close()
            for path in folder.iterdir():
                path.unlink()
    finally:
        for one in listeners:
            one.close()


class Asked(Told):
    @property
    def person(self) -> bool:
        return bool(self._answers)


async def refusal(ssh: SshSpec, folder: Path, told: Asked | None = None, **secrets: str) -> TunnelError:
    with pytest.raises(TunnelError) as caught:
        async with connected(ssh, folder, 1, told=told, **secrets):
            pass
    for path in folder.iterdir():
        path.unlink()
    return caught.value


@pytest.fixture
async def sshd(tmp_path: Path) -> AsyncIterator[Sshd]:
    async with Sshd(tmp_path / "sshd", {"LogLevel": "INFO"}) as sshd:
        yield sshd


async def collect(connection: OpensshConnection, command: str) -> tuple[bytes, bytes, int | None]:
    running = await connection.start_command(command)
    output = {OutputStream.STDOUT: b"", OutputStream.STDERR: b""}
    try:
        async with asyncio.timeout(20):
            while (piece := await running.read()) is not None:
                output[piece[0]] += piece[1]
    finally:
        await running.kill()
    return output[OutputStream.STDOUT], output[OutputStream.STDERR], running.exit_status


def _other_key(sshd: Sshd) -> str:
    """As the two fields of a known_hosts line."""
    path = sshd.folder / "some_other_key"
    key = path if path.exists() else keygen(path)
    return " ".join(key.with_suffix(".pub").read_text().split()[:2])


# -- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_hold_no_secret_and_no_option_by_way_of_a_host(tmp_path: Path) -> None:
    ssh = SshSpec("-oProxyCommand=evil", user="me", alias=None, known_hosts=tmp_path / "a b%c", agent=False)
    setup = ConnectRequest("n", ssh, (), (("password", "hunter2"), ("passphrase", "hunter3")), control_dir="/x")
    command = master_command(setup, Path("/x/c"), batch=False, session=True)
    assert "hunter" not in " ".join(command)
    assert command[command.index("--") + 1 :] == ["-oProxyCommand=evil", "exec cat"]
    assert f'UserKnownHostsFile="{tmp_path}/a b%%c"' in command
    assert "hunter" not in repr(setup)


def test_jump_hosts_are_a_chain_that_ssh_can_read(tmp_path: Path) -> None:
    """Each ``ssh`` of the chain unquotes and expands its ProxyCommand once; ``ssh -G`` tells what it would use."""
    ssh = SshSpec(
        "gpu", known_hosts=tmp_path / "k%h", proxy_jump=("a@one:2201", "two"), transport=TransportKind.OPENSSH
    )
    command = master_command(ConnectRequest("n", ssh, ()), Path("/x/c"), batch=True, session=True)
    (last,) = [word.removeprefix("ProxyCommand=") for word in command if word.startswith("ProxyCommand=")]
    words = shlex.split(re.sub("%([hp%])", lambda found: {"h": "gpu", "p": "22", "%": "%"}[found[1]], last))
    assert words[-1] == "two"
    assert words[words.index("-W") + 1] == "[gpu]:22"
    (first,) = [word.removeprefix("ProxyCommand=") for word in words if word.startswith("ProxyCommand=")]
    inner = shlex.split(first)
    assert inner[-1] == "one"
    assert inner[inner.index("-W") + 1] == "[%h]:%p"
    assert inner[inner.index("-l") + 1] == "a"
    assert inner[inner.index("-p") + 1] == "2201"


# -- the connection --------------------------------------------------------------------------------------------------


class TestReal:
    pytestmark = real

    async def test_forwards_with_half_close_and_many_at_once(self, sshd: Sshd, folder: Path) -> None:
        async with serving(echo) as port, connected(sshd.spec(), folder, port) as (connection, (local,)):
            assert connection.info.rtt_ms is not None
            answers = await asyncio.gather(*(exchange(local, bytes([n]) * 50_000) for n in range(20)))
            assert answers == [bytes([n]) * 50_000 for n in range(20)]

    async def test_a_new_key_is_not_recorded_in_a_file_of_another_kind(
        self, sshd: Sshd, folder: Path, tmp_path: Path
    ) -> None:
        profile = tmp_path / "profile"
        profile.write_text("export PATH=/x\n")
        ssh = dataclasses.replace(sshd.spec(), host_key_policy=HostKeyPolicy.ACCEPT_NEW, known_hosts=profile)
        with pytest.raises(TunnelError, match="is no known_hosts file"):
            async with connected(ssh, folder):
                pass
        assert profile.read_text() == "export PATH=/x\n"

    @pytest.mark.parametrize("key", ["identity_files", "known_hosts"])
    async def test_no_variable_in_a_files_name_is_expanded(
        self, key: str, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """ssh would, and its error, or the file that it makes, would hold the secret."""
        monkeypatch.setenv("GPUMESH_API_KEY", "sekret")
        path = tmp_path / "${GPUMESH_API_KEY}"
        ssh = dataclasses.replace(sshd.spec(), host_key_policy=HostKeyPolicy.ACCEPT_NEW)
        if key == "known_hosts":
            ssh = dataclasses.replace(ssh, known_hosts=path)
        else:
            ssh = dataclasses.replace(ssh, identity_files=(path,))
        with pytest.raises(TunnelError) as caught:
            async with connected(ssh, folder):
                pass
        assert "sekret" not in str(caught.value)
        assert not (tmp_path / "sekret").exists()
        assert "ssh would take for a variable" in caught.value.message

    async def test_sockets_are_for_us_alone_and_gone_afterwards(self, sshd: Sshd, folder: Path) -> None:
        async with connected(sshd.spec(password_env="P"), folder, 1, password="x"):
            sockets = [path for path in folder.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
            assert len(sockets) >= 2
            assert {stat.S_IMODE(path.stat().st_mode) for path in sockets} == {0o600}

    async def test_commands(self, sshd: Sshd, folder: Path) -> None:
        async with connected(sshd.spec(), folder) as (connection, _):
            told = await collect(connection, shlex.join(["sh", "-c", "echo 'a b'; echo err >&2; exit 7"]))
            assert told == (b"a b\n", b"err\n", 7)
            output, _, status = await collect(connection, "head -c 3000000 /dev/zero")
            assert (len(output), status) == (3_000_000, 0)
            assert (await collect(connection, "no-such-command"))[2] == 127
            assert (await collect(connection, "cat"))[2] == 0  # its input is empty

    async def test_killing_a_command_ends_it_on_the_host(self, sshd: Sshd, folder: Path) -> None:
        async with connected(sshd.spec(), folder) as (connection, _):
            running = await connection.start_command("sh -c 'echo $$; sleep 600; true'")
            piece = await running.read()
            assert piece is not None
            pid = int(piece[1])
            assert alive(pid)
            await running.kill()
            await wait_until(lambda: not alive(pid), "the command's end")
            await running.kill()
            assert await connection.ping(10.0) is not None

    async def test_a_command_that_the_connections_end_cut_off_has_no_status(self, sshd: Sshd, folder: Path) -> None:
        """ssh says 255 then, which may be a command's own as well."""
        async with connected(sshd.spec(), folder) as (connection, _):
            assert (await collect(connection, "sh -c 'exit 255'"))[2] == 255
            cut_off = asyncio.create_task(collect(connection, "sleep 600"))
            before = set(sshd.children())
            await wait_until(lambda: len(set(sshd.children()) - before) > 0, "the command at the host")
            os.kill(sshd.children()[0], signal.SIGKILL)
            with pytest.raises(ExecError, match="broke"):
                await cut_off

    async def test_no_session_left_for_a_command(self, tmp_path: Path, folder: Path) -> None:
        async with Sshd(tmp_path / "few", {"MaxSessions": "1"}) as sshd, connected(sshd.spec(), folder) as (made, _):
            with pytest.raises(ExecError, match="session"):
                await collect(made, "true")
            assert await made.ping(10.0) is not None

    @pytest.mark.slow
    async def test_a_login_shell_that_is_slow_to_start(self, tmp_path: Path, folder: Path) -> None:
        """Its start-up files take longer than a sign of life may."""
        slow = {"ForceCommand": 'sleep 4.5; echo Welcome; exec sh -c "$SSH_ORIGINAL_COMMAND"'}
        async with (
            Sshd(tmp_path, slow) as sshd,
            serving(echo) as port,
            connected(sshd.spec(), folder, port) as (connection, (local,)),
        ):
            assert await connection.ping(2.5) is not None
            assert await connection.ping(2.5) is not None
            await exchange(local, b"hello")

    @pytest.mark.parametrize("options", [{"ForceCommand": "/bin/false"}, {"MaxSessions": "0"}])
    async def test_a_host_without_commands_still_forwards(
        self, tmp_path: Path, folder: Path, options: dict[str, str]
    ) -> None:
        async with (
            Sshd(tmp_path / "bare", options) as sshd,
            serving(echo) as port,
            connected(sshd.spec(), folder, port) as (connection, (local,)),
        ):
            assert await exchange(local, b"hello") == b"hello"
            assert await connection.ping(10.0) is not None

    async def test_a_killed_session_is_noticed_at_once_and_a_frozen_one_by_ping(self, sshd: Sshd, folder: Path) -> None:
        async with connected(sshd.spec(), folder) as (connection, _):
            sshd.kill_sessions(signal.SIGSTOP)
            assert await connection.ping(0.2) is None
            sshd.kill_sessions(signal.SIGKILL)
            async with asyncio.timeout(10):
                error = await connection.wait_lost()
            assert error.code == "tunnel-lost"
            assert await connection.ping(1.0) is None

    async def test_nothing_of_it_is_left(self, sshd: Sshd, folder: Path) -> None:
        async with connected(sshd.spec(), folder) as (connection, _):
            master = connection._master.process.pid
        assert not alive(master)
        await wait_until(lambda: not sshd.children(), "sshd's session ended")

    async def test_forwarding_forbidden(self, tmp_path: Path, folder: Path) -> None:
        async with Sshd(tmp_path / "no", {"AllowTcpForwarding": "no"}) as sshd:
            error = await refusal(sshd.spec(), folder)
        assert error.code == "forwarding-forbidden"
        assert "sshd_config" in (error.hint or "")

    async def test_forwarding_allowed_to_one_of_two(self, tmp_path: Path, folder: Path) -> None:
        told = Asked()
        async with serving(echo) as good, serving(echo) as bad:
            async with (
                Sshd(tmp_path / "some", {"PermitOpen": f"127.0.0.1:{good}"}) as sshd,
                connected(sshd.spec(), folder, good, bad, told=told) as (_, (local, _other)),
            ):
                assert await exchange(local, b"hello") == b"hello"
            assert told.refused == [(Target("127.0.0.1", bad), "forwarding-forbidden")]

    async def test_a_backend_that_is_away_is_told(self, sshd: Sshd, folder: Path) -> None:
        told = Asked()
        with socket.create_server(("127.0.0.1", 0)) as closing:
            port = closing.getsockname()[1]
        async with connected(sshd.spec(), folder, port, told=told) as (_, (local,)):
            with contextlib.suppress(ConnectionError):
                assert await exchange(local, b"x") == b""
            await wait_until(lambda: bool(told.refused), "the report")
        assert told.refused == [(Target("127.0.0.1", port), "backend-unreachable")]

    # -- true reasons ------------------------------------------------------------------------------------------------

    async def test_wrong_key(self, sshd: Sshd, folder: Path, tmp_path: Path) -> None:
        error = await refusal(sshd.spec(identity_files=(keygen(tmp_path / "wrong"),)), folder)
        assert error.code == "auth-refused"
        assert "authorized_keys" in (error.hint or "")

    async def test_unknown_changed_and_revoked_host_key(self, sshd: Sshd, folder: Path) -> None:
        right = sshd.known_hosts.read_text()
        sshd.known_hosts.write_text("")
        assert (await refusal(sshd.spec(), folder)).code == "host-key-unknown"
        # A person is never asked this by ssh itself: `gpumesh trust` is for that.
        assert (await refusal(sshd.spec(), folder, Asked("yes"))).code == "host-key-unknown"
        async with connected(sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW), folder):
            pass
        other = keygen(sshd.folder / "another").with_suffix(".pub").read_text()
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
        for policy in HostKeyPolicy:
            error = await refusal(sshd.spec(host_key_policy=policy), folder)
            assert error.code == "host-key-changed"
        sshd.known_hosts.write_text(f"@revoked * {sshd.public_host_key}\n{right}")
        assert (await refusal(sshd.spec(), folder)).code == "host-key-revoked"

    async def test_a_nodes_own_entry_decides_alone(self, sshd: Sshd, folder: Path) -> None:
        sshd.known_hosts.write_text(f"{hostkeys.host_key_alias('iceland')} {sshd.public_host_key}\n")
        async with connected(sshd.spec(), folder):
            pass

    async def test_a_first_key_is_kept_for_the_node_so_that_it_may_move(self, sshd: Sshd, folder: Path) -> None:
        sshd.known_hosts.write_text("")
        first = sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW)
        async with connected(first, folder):
            pass
        known = hostkeys.read_known_hosts(sshd.known_hosts)
        assert any(entry.matches(hostkeys.host_key_alias("iceland")) for entry in known.entries)
        await sshd.stop()
        sshd.port = 0
        recorded = sshd.known_hosts.read_text()
        await sshd.start()
        sshd.known_hosts.write_text(recorded)
        for policy in HostKeyPolicy:  # known, though at another address
            async with connected(sshd.spec(host_key_policy=policy), folder):
                pass
        assert sshd.known_hosts.read_text() == recorded
        sshd.known_hosts.write_text(recorded.replace(sshd.public_host_key.split()[1], _other_key(sshd).split()[1]))
        error = await refusal(sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW), folder)
        assert error.code == "host-key-changed"

    async def test_what_is_revoked_for_the_address_is_for_the_node(self, sshd: Sshd, folder: Path) -> None:
        """ssh itself would look under one name only."""
        own = f"{hostkeys.host_key_alias('iceland')} {sshd.public_host_key}\n"
        sshd.known_hosts.write_text(f"{own}@revoked [127.0.0.1]:{sshd.port} {sshd.public_host_key}\n")
        assert (await refusal(sshd.spec(), folder)).code == "host-key-revoked"
        sshd.known_hosts.write_text(f"{own}@revoked [127.0.0.1]:{sshd.port} {_other_key(sshd)}\n")
        async with connected(sshd.spec(), folder):
            pass

    async def test_a_certificate_authority_vouches_for_hosts(self, tmp_path: Path, folder: Path) -> None:
        """OpenSSH's client checks certificates; the other transport says that it cannot."""
        sshd = Sshd(tmp_path / "certified", {"LogLevel": "INFO"})
        authority = keygen(tmp_path / "ca")
        command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", "127.0.0.1"]
        subprocess.run([*command, str(sshd.host_key.with_suffix(".pub"))], check=True, timeout=20)
        sshd.options["HostCertificate"] = str(sshd.host_key) + "-cert.pub"
        async with sshd:
            public = authority.with_suffix(".pub").read_text()
            sshd.known_hosts.write_text(f"@cert-authority [127.0.0.1]:* {public}")
            for policy in HostKeyPolicy:
                async with connected(sshd.spec(host_key_policy=policy), folder):
                    pass
            assert len(hostkeys.read_known_hosts(sshd.known_hosts).entries) == 1  # nothing had to be recorded
            told = await sshtunnel_refusal(sshd.spec())
            assert told.code == "host-key-unknown"
            assert "certificate authority" in told.message
            assert "openssh" in (told.hint or "")
            sshd.known_hosts.write_text(f"@cert-authority [127.0.0.1]:* {_other_key(sshd)}\n")
            assert (await refusal(sshd.spec(), folder)).code == "host-key-unknown"

    async def test_several_keys_of_which_some_cannot_be_used(self, sshd: Sshd, folder: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.write_text("no key\n")
        broken.chmod(0o600)
        files = (tmp_path / "missing", broken, keygen(tmp_path / "wrong"), sshd.identity)
        async with connected(sshd.spec(identity_files=files), folder):
            pass
        assert (await refusal(sshd.spec(identity_files=files[:1]), folder)).code in ("key-unreadable", "auth-refused")

    async def test_an_agent(self, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "agent"
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
        try:
            await wait_until(path.exists, "the agent's socket")
            monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
            subprocess.run(["ssh-add", "-q", str(sshd.identity)], check=True, timeout=10)
            async with connected(sshd.spec(identity_files=(), agent=True), folder):
                pass
            assert (await refusal(sshd.spec(identity_files=()), folder)).code == "auth-refused"
        finally:
            agent.kill()
            agent.wait()

    async def test_a_password_is_given_once(self, tmp_path: Path, folder: Path) -> None:
        async with asking(tmp_path, Asking("password", "hunter2", (), [])) as ssh:
            spec = dataclasses.replace(ssh, password_env="PW")
            async with connected(spec, folder, password="hunter2") as (connection, _):
                assert await connection.ping(10.0) is not None
            error = await refusal(spec, folder, password="wrong-planted")
            assert error.code == "auth-refused"
            assert "planted" not in f"{error.message} {error.hint}"

    async def test_questions_go_to_a_person(self, tmp_path: Path, folder: Path) -> None:
        server = Asking("keyboard-interactive", "", [("Code:\x07 ", True), ("Pin: ", False)], ["123", "456"])
        async with asking(tmp_path, server) as ssh:
            # Twice: this host lets us in and then gives no session, and ssh logs in anew without one.
            told = Asked("123", "456", "123", "456")
            async with connected(ssh, folder, told=told):
                pass
            assert ["Code" in told.questions[0][0], "Pin" in told.questions[1][0]] == [True, True]
            assert all(text.isprintable() for text, _ in told.questions)
            assert (await refusal(ssh, folder, Asked("no", "no"))).code == "auth-refused"

    async def test_passphrase_and_who_is_asked_for_it(self, sshd: Sshd, folder: Path, tmp_path: Path) -> None:
        locked = keygen(tmp_path / "locked", passphrase="correct horse")
        sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
        spec = sshd.spec(identity_files=(locked,))
        async with connected(spec, folder, passphrase="correct horse"):
            pass
        told = Asked("correct horse")
        async with connected(spec, folder, told=told):
            pass
        assert "passphrase" in told.questions[0][0]
        error = await refusal(spec, folder, passphrase="wrong-secret")
        assert error.code in ("key-unreadable", "auth-refused")
        assert "wrong-secret" not in error.message + (error.hint or "")

    async def test_secrets_are_not_seen_in_any_process(self, sshd: Sshd, folder: Path, tmp_path: Path) -> None:
        """While ssh asks, the arguments and environments of all processes are looked through."""
        locked = keygen(tmp_path / "locked", passphrase="correct horse")
        sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
        seen: list[Path] = []

        class Looking(Asked):
            async def ask_person(self, text: str, *, echo: bool) -> str | None:
                for process in Path("/proc").iterdir():
                    for name in ("cmdline", "environ"):
                        with contextlib.suppress(OSError):
                            if b"planted-secret" in (process / name).read_bytes():
                                seen.append(process)
                return await super().ask_person(text, echo=echo)

        told = Looking("correct horse")
        spec = sshd.spec(identity_files=(locked,))
        async with connected(spec, folder, told=told, password="planted-secret"):
            pass
        assert told.questions
        assert not seen

    async def test_names_ports_and_other_services(self, sshd: Sshd, folder: Path) -> None:
        assert (await refusal(sshd.spec(host="no-such-host.invalid"), folder)).code == "host-unresolved"
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            error = await refusal(sshd.spec(port=port, connect_timeout_s=1.0), folder)
            assert error.code == "connect-timeout"
        assert (await refusal(sshd.spec(port=port), folder)).code == "connect-refused"

    async def test_terminal_escapes_of_a_host_do_not_come_through(self, sshd: Sshd, folder: Path) -> None:
        async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"\x1b]0;owned\x07\x1b[2J\r\n" * 2000)
            await writer.drain()

        async with serving(speak) as port:
            error = await refusal(sshd.spec(port=port), folder)
        assert error.message.isprintable()
        assert len(error.message) < 500

    async def test_cancelling_a_connect_leaves_nothing(self, sshd: Sshd, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            spec = sshd.spec(port=silent.getsockname()[1], connect_timeout_s=60.0)
            task = asyncio.create_task(connect(make_setup(spec, folder), (), Asked()))
            peer, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
            with peer:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                peer.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    while peer.recv(4096):
                        pass

    async def test_through_jump_hosts(self, sshd: Sshd, tmp_path: Path, folder: Path) -> None:
        async with Sshd(tmp_path / "jump") as jump, serving(echo) as port:
            jump.authorized_keys.write_text(sshd.authorized_keys.read_text())
            sshd.known_hosts.write_text(sshd.known_hosts.read_text() + jump.known_hosts.read_text())
            user = sshd.spec().user
            hop = f"{user}@127.0.0.1:{jump.port}"
            async with connected(sshd.spec(proxy_jump=(hop, hop)), folder, port) as (_, (local,)):
                assert await exchange(local, b"far") == b"far"
            sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {sshd.public_host_key}\n")
            assert (await refusal(sshd.spec(proxy_jump=(hop,)), folder)).code == "host-key-unknown"

    async def test_the_master_ends_when_its_process_is_killed(self, sshd: Sshd, tmp_path: Path, folder: Path) -> None:
        """In a process of its own, which is killed as hard as can be."""
        script = tmp_path / "holder.py"
        script.write_text(HOLDER)
        spec = sshd.spec()
        arguments = [str(sshd.port), spec.user, str(sshd.identity), str(sshd.known_hosts), str(folder)]
        python = [sys.executable, str(script), *arguments]
        with subprocess.Popen(python, stdout=subprocess.PIPE, cwd=os.getcwd()) as holder:
            assert holder.stdout is not None
            master = int(await asyncio.get_running_loop().run_in_executor(None, holder.stdout.readline))
            assert alive(master)
            holder.kill()
        await wait_until(lambda: not alive(master), "the master's end")
        await wait_until(lambda: not sshd.children(), "sshd's session ended")


HOLDER = """
import asyncio, sys
from pathlib import Path
from gpumesh.topology import SshSpec
from gpumesh.tunnels.transport import ConnectRequest
from gpumesh.tunnels.openssh.connection import connect

async def main():
    port, user, identity, known_hosts, folder = sys.argv[1:]
    ssh = SshSpec("127.0.0.1", int(port), user, (Path(identity),), Path(known_hosts), agent=False)
    connection = await connect(ConnectRequest("n", ssh, (), control_dir=folder), (), None)
    print(connection._master.process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
