"""Logging in with the system's ssh against a real OpenSSH sshd: keys, trust, questions, and true reasons."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpumesh.errors import TunnelError
from gpumesh.topology import HostKeyPolicy
from gpumesh.tunnels import known_hosts
from gpumesh.tunnels.openssh.connection import connect
from gpumesh.tunnels.openssh.login import was_only_session_refused
from gpumesh.tunnels.openssh.ssh_output import SshOutput
from tests.tunnels.inprocess.connecting import connect_error as sshtunnel_connect_error
from tests.tunnels.openssh.connecting import connect_error, connected, make_other_key, make_setup
from tests.tunnels.polling import wait_until
from tests.tunnels.questioning_server import QuestioningServer, run_questioning_server
from tests.tunnels.recorded_events import RecordedEvents
from tests.tunnels.sshd import Sshd, is_listening, keygen, needs_sshd, serving
from tests.tunnels.traffic import echo, exchange

pytestmark = [
    pytest.mark.real,
    needs_sshd,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's ssh"),
]


async def test_a_new_key_is_not_recorded_in_a_file_of_another_kind(sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.write_text("export PATH=/x\n")
    ssh = dataclasses.replace(sshd.spec(), host_key_policy=HostKeyPolicy.ACCEPT_NEW, known_hosts=profile)
    with pytest.raises(TunnelError, match="is no known_hosts file"):
        async with connected(ssh, folder):
            pass
    assert profile.read_text() == "export PATH=/x\n"


@pytest.mark.parametrize("key", ["identity_files", "known_hosts"])
async def test_no_variable_in_a_files_name_is_expanded(
    key: str, sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh would expand it, and its error or the file that it writes would hold the secret."""
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


async def test_wrong_key(sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    error = await connect_error(sshd.spec(identity_files=(keygen(tmp_path / "wrong"),)), folder)
    assert error.code == "auth-refused"
    assert "authorized_keys" in (error.hint or "")


async def test_unknown_changed_and_revoked_host_key(sshd: Sshd, folder: Path) -> None:
    right = sshd.known_hosts.read_text()
    sshd.known_hosts.write_text("")
    assert (await connect_error(sshd.spec(), folder)).code == "host-key-unknown"
    # ssh never asks a person about trust: `gpumesh trust` is for that.
    assert (await connect_error(sshd.spec(), folder, RecordedEvents("yes"))).code == "host-key-unknown"
    async with connected(sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW), folder):
        pass
    other = keygen(sshd.folder / "another").with_suffix(".pub").read_text()
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {other}")
    for policy in HostKeyPolicy:
        error = await connect_error(sshd.spec(host_key_policy=policy), folder)
        assert error.code == "host-key-changed"
    sshd.known_hosts.write_text(f"@revoked * {sshd.public_host_key}\n{right}")
    assert (await connect_error(sshd.spec(), folder)).code == "host-key-revoked"


async def test_a_nodes_own_entry_decides(sshd: Sshd, folder: Path) -> None:
    sshd.known_hosts.write_text(f"{known_hosts.host_key_alias('iceland')} {sshd.public_host_key}\n")
    async with connected(sshd.spec(), folder):
        pass


async def test_a_first_key_is_recorded_for_the_node_and_known_after_a_move(sshd: Sshd, folder: Path) -> None:
    sshd.known_hosts.write_text("")
    first = sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW)
    async with connected(first, folder):
        pass
    known = known_hosts.read_known_hosts(sshd.known_hosts)
    assert any(entry.matches(known_hosts.host_key_alias("iceland")) for entry in known.entries)
    await sshd.stop()
    sshd.port = 0
    recorded = sshd.known_hosts.read_text()
    await sshd.start()
    sshd.known_hosts.write_text(recorded)
    for policy in HostKeyPolicy:  # known, though at another address
        async with connected(sshd.spec(host_key_policy=policy), folder):
            pass
    assert sshd.known_hosts.read_text() == recorded
    sshd.known_hosts.write_text(recorded.replace(sshd.public_host_key.split()[1], make_other_key(sshd).split()[1]))
    error = await connect_error(sshd.spec(host_key_policy=HostKeyPolicy.ACCEPT_NEW), folder)
    assert error.code == "host-key-changed"


async def test_a_key_revoked_for_the_address_is_revoked_for_the_node(sshd: Sshd, folder: Path) -> None:
    """ssh itself checks one of the two names only."""
    own = f"{known_hosts.host_key_alias('iceland')} {sshd.public_host_key}\n"
    sshd.known_hosts.write_text(f"{own}@revoked [127.0.0.1]:{sshd.port} {sshd.public_host_key}\n")
    assert (await connect_error(sshd.spec(), folder)).code == "host-key-revoked"
    sshd.known_hosts.write_text(f"{own}@revoked [127.0.0.1]:{sshd.port} {make_other_key(sshd)}\n")
    async with connected(sshd.spec(), folder):
        pass


async def test_a_host_key_signed_by_a_certificate_authority_is_trusted(tmp_path: Path, folder: Path) -> None:
    """OpenSSH's client checks certificates; the error of the other transport says that it cannot."""
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
        assert len(known_hosts.read_known_hosts(sshd.known_hosts).entries) == 1  # nothing was recorded
        error = await sshtunnel_connect_error(sshd.spec())
        assert error.code == "host-key-unknown"
        assert "certificate authority" in error.message
        assert "openssh" in (error.hint or "")
        sshd.known_hosts.write_text(f"@cert-authority [127.0.0.1]:* {make_other_key(sshd)}\n")
        assert (await connect_error(sshd.spec(), folder)).code == "host-key-unknown"


async def test_several_keys_of_which_some_cannot_be_used(sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("no key\n")
    broken.chmod(0o600)
    files = (tmp_path / "missing", broken, keygen(tmp_path / "wrong"), sshd.identity)
    async with connected(sshd.spec(identity_files=files), folder):
        pass
    assert (await connect_error(sshd.spec(identity_files=files[:1]), folder)).code in ("key-unreadable", "auth-refused")


async def test_an_agent(sshd: Sshd, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        await wait_until(lambda: is_listening(path), "the agent's socket")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        subprocess.run(["ssh-add", "-q", str(sshd.identity)], check=True, timeout=10)
        async with connected(sshd.spec(identity_files=(), agent=True), folder):
            pass
        assert (await connect_error(sshd.spec(identity_files=()), folder)).code == "auth-refused"
    finally:
        agent.kill()
        agent.wait()


async def test_a_password_is_given_once(tmp_path: Path, folder: Path) -> None:
    async with run_questioning_server(tmp_path, QuestioningServer("password", "hunter2", (), [])) as ssh:
        spec = dataclasses.replace(ssh, password_env="PW")
        async with connected(spec, folder, password="hunter2") as (connection, _):
            assert await connection.ping(10.0) is not None
        error = await connect_error(spec, folder, password="wrong-planted")
        assert error.code == "auth-refused"
        assert "planted" not in f"{error.message} {error.hint}"


async def test_questions_go_to_a_person(tmp_path: Path, folder: Path) -> None:
    server = QuestioningServer("keyboard-interactive", "", [("Code:\x07 ", True), ("Pin: ", False)], ["123", "456"])
    async with run_questioning_server(tmp_path, server) as ssh:
        # Twice: this host accepts the login and then gives no session, so ssh logs in again without a session.
        events = RecordedEvents("123", "456", "123", "456")
        async with connected(ssh, folder, events=events):
            pass
        assert ["Code" in events.questions[0][0], "Pin" in events.questions[1][0]] == [True, True]
        assert all(text.isprintable() for text, _ in events.questions)
        assert (await connect_error(ssh, folder, RecordedEvents("no", "no"))).code == "auth-refused"


async def test_passphrase_and_who_is_asked_for_it(sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    spec = sshd.spec(identity_files=(locked,))
    async with connected(spec, folder, passphrase="correct horse"):
        pass
    events = RecordedEvents("correct horse")
    async with connected(spec, folder, events=events):
        pass
    assert "passphrase" in events.questions[0][0]
    error = await connect_error(spec, folder, passphrase="wrong-secret")
    assert error.code in ("key-unreadable", "auth-refused")
    assert "wrong-secret" not in error.message + (error.hint or "")


async def test_secrets_are_not_seen_in_any_process(sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    """While ssh asks, the arguments and environments of all processes are searched."""
    locked = keygen(tmp_path / "locked", passphrase="correct horse")
    sshd.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    seen: list[Path] = []

    class Looking(RecordedEvents):
        async def ask_person(self, text: str, *, echo: bool) -> str | None:
            for process in Path("/proc").iterdir():
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        if b"planted-secret" in (process / name).read_bytes():
                            seen.append(process)
            return await super().ask_person(text, echo=echo)

    events = Looking("correct horse")
    spec = sshd.spec(identity_files=(locked,))
    async with connected(spec, folder, events=events, password="planted-secret"):
        pass
    assert events.questions
    assert not seen


async def test_names_ports_and_other_services(sshd: Sshd, folder: Path) -> None:
    assert (await connect_error(sshd.spec(host="no-such-host.invalid"), folder)).code == "host-unresolved"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        error = await connect_error(sshd.spec(port=port, connect_timeout_s=1.0), folder)
        assert error.code == "connect-timeout"
    assert (await connect_error(sshd.spec(port=port), folder)).code == "connect-refused"


async def test_terminal_escapes_of_a_host_do_not_come_through(sshd: Sshd, folder: Path) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x1b]0;owned\x07\x1b[2J\r\n" * 2000)
        await writer.drain()

    async with serving(speak) as port:
        error = await connect_error(sshd.spec(port=port), folder)
    assert error.message.isprintable()
    assert len(error.message) < 500


async def test_cancelling_a_connect_leaves_nothing(sshd: Sshd, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spec = sshd.spec(port=silent.getsockname()[1], connect_timeout_s=60.0)
        task = asyncio.create_task(connect(make_setup(spec, folder), (), RecordedEvents()))
        peer, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
        with peer:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            peer.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(4096):
                    pass


async def test_through_jump_hosts(sshd: Sshd, tmp_path: Path, folder: Path) -> None:
    async with Sshd(tmp_path / "jump") as jump, serving(echo) as port:
        jump.authorized_keys.write_text(sshd.authorized_keys.read_text())
        sshd.known_hosts.write_text(sshd.known_hosts.read_text() + jump.known_hosts.read_text())
        user = sshd.spec().user
        hop = f"{user}@127.0.0.1:{jump.port}"
        async with connected(sshd.spec(proxy_jump=(hop, hop)), folder, port) as (_, (local,)):
            assert await exchange(local, b"far") == b"far"
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {sshd.public_host_key}\n")
        assert (await connect_error(sshd.spec(proxy_jump=(hop,)), folder)).code == "host-key-unknown"


LOGGED_IN = "debug1: clientloop.c:client_loop():1290 (pid=1): Entering interactive session."


@pytest.mark.parametrize(
    ("lines", "returncode", "only_session"),
    [
        (["exec request failed on channel 0"], 255, True),
        (["channel 0: open failed: administratively prohibited: open failed"], 255, True),
        ([], 1, True),  # the host ran a command of its own, which has ended
        (["me@gpu: Permission denied (publickey)."], 255, False),
        ([], 255, False),
        ([LOGGED_IN], 255, True),  # the same, with this status or by a signal
        ([LOGGED_IN, "debug1: clientloop.c:client_loop():1531 (pid=1): Exit status 255"], 255, True),
        ([LOGGED_IN, "Connection to 10.0.0.1 closed by remote host."], 255, False),
        (["Error: Your SSH client doesn't support PTY"], 1, False),
    ],
)
def test_whether_only_the_session_was_refused(lines: list[str], returncode: int, only_session: bool) -> None:
    output = SshOutput()
    for line in lines:
        output.add_log_line(line)
    assert was_only_session_refused(output, returncode) is only_session


async def test_what_a_proxy_command_prints_is_no_banner(sshd: Sshd, folder: Path, tmp_path: Path) -> None:
    """Many print that they are connected. A host that does not answer the login then is hung, and waits for nobody."""
    proxy = tmp_path / "proxy"
    proxy.write_text(
        f"#!{sys.executable}\nimport socket, sys, time\nsys.stderr.write('connected\\n')\nsys.stderr.flush()\n"
        "sys.stdout.write('SSH-2.0-OpenSSH_9.2\\r\\n')\nsys.stdout.flush()\ntime.sleep(600)\n"
    )
    proxy.chmod(0o700)
    (tmp_path / ".ssh").mkdir(mode=0o700)
    (tmp_path / ".ssh" / "config").write_text(f"Host gpu\n  ProxyCommand {proxy}\n")
    (tmp_path / ".ssh" / "config").chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        patch.setattr(Path, "home", classmethod(lambda _cls: tmp_path))
        error = await connect_error(sshd.spec(alias="gpu", connect_timeout_s=1.0), folder)
    assert error.code == "connect-timeout"
    (tmp_path / ".ssh" / "config").write_text(
        f"Host gpu\n  ProxyCommand sh -c 'echo connected >&2; exec {sys.executable} {tmp_path}/relay %h %p'\n"
    )
    (tmp_path / "relay").write_text(RELAY)
    sshd.known_hosts.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        patch.setattr(Path, "home", classmethod(lambda _cls: tmp_path))
        error = await connect_error(sshd.spec(alias="gpu"), folder)
    assert error.code == "host-key-unknown"
    assert error.message.endswith("its ProxyCommand says: connected")


RELAY = """
import os, socket, sys, threading
host = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def send():
    while data := os.read(0, 65536):
        host.sendall(data)
    os._exit(0)
threading.Thread(target=send, daemon=True).start()
while data := host.recv(65536):
    os.write(1, data)
"""
