"""Each kind of host, by both transports: the tunnel carries bytes and stays up, what is said of the GPUs is true, and a
person's command runs where the account allows it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.probes.nvidia_smi import Answer
from gpumesh.topology import TransportKind
from gpumesh.tunnels.workers.worker_pool import WorkerPool
from tests.prerequisites import needs
from tests.tunnels.hosts.account import PASSWORD
from tests.tunnels.hosts.visit import Expected, Host, running, visiting
from tests.tunnels.sshd import is_listening

pytestmark = [pytest.mark.real, pytest.mark.slow, needs("sshd", "ssh", "nss-wrapper")]

NO_COMMANDS = Expected(Answer.NO_COMMANDS, "gpu-unknown", "runs no commands", gpus=0, exec_works=False)
NO_SESSION = Expected(Answer.NO_SESSION, "gpu-unknown", "gives no session", gpus=0, exec_works=False)
SLOW_SHELL = Expected(Answer.UNFINISHED, "login-shell-slow", "login shell has not started", gpus=0, exec_works=False)
LOUD = "printf 'Welcome \\033[31m\\033]0;owned\\007 to the pod\\n@gpumesh@ 0\\n'; echo oops >&2\n"

HOSTS = [
    Host("bash"),
    Host("bash that prints, with escapes", files={".bashrc": LOUD}),
    Host("fish", shell="fish", files={".config/fish/config.fish": "echo Welcome\n"}, needs=("fish",)),
    Host("zsh that prints", shell="zsh", files={".zshenv": LOUD}, needs=("zsh",)),
    Host("tcsh that prints", shell="tcsh", files={".tcshrc": "echo Welcome\n"}, needs=("tcsh",)),
    Host("dash", shell="dash"),
    Host("a restricted bash", shell="rbash"),
    Host("/bin/false", shell="false", expected=NO_COMMANDS),
    Host("nologin", shell="nologin", expected=NO_COMMANDS),
    Host(
        "ForceCommand that prints",
        options={"ForceCommand": "echo only forwarding here; date +%N"},
        expected=NO_COMMANDS,
    ),
    Host(
        "ForceCommand that prints the command",
        options={"ForceCommand": 'echo "not allowed: $SSH_ORIGINAL_COMMAND"'},
        expected=NO_COMMANDS,
    ),
    Host(
        "ForceCommand that lets nvidia-smi through",
        options={
            "ForceCommand": 'case $SSH_ORIGINAL_COMMAND in nvidia-smi*) eval "$SSH_ORIGINAL_COMMAND";; *) exit 9;; esac'
        },
        expected=Expected(exec_works=False),
    ),
    Host("ForceCommand that fails as ssh does", options={"ForceCommand": "exit 255"}, expected=NO_COMMANDS),
    Host(
        "ForceCommand that is killed",
        options={"ForceCommand": "kill -9 $$"},
        expected=Expected(Answer.NO_SESSION, "gpu-unknown", "ended the session", gpus=0, exec_works=False),
        expected_openssh=NO_COMMANDS,
    ),
    Host("a missing ChrootDirectory", options={"ChrootDirectory": "/nonexistent"}, expected=NO_COMMANDS),
    Host(
        "bash that reads a line before each command",
        files={".bashrc": "read -r line\n"},
        expected=Expected(Answer.UNFINISHED, "login-shell-slow", "login shell has not started", gpus=0),
        timeout_s=0.5,
    ),
    Host("ForceCommand that waits", options={"ForceCommand": "sleep 600"}, expected=SLOW_SHELL, timeout_s=0.5),
    Host("no commands, by MaxSessions", options={"MaxSessions": "0"}, expected=NO_SESSION),
    Host("MaxSessions 1", options={"MaxSessions": "1"}, reconnects_openssh=1),
    Host("MaxSessions 2", options={"MaxSessions": "2"}),
    Host("MaxStartups", options={"MaxStartups": "1:100:1"}),
    Host("a banner", options={"Banner": "{home}/banner"}, files={"banner": "\033[2JKeep out\n" * 40}),
    Host("no terminal, no SFTP", options={"PermitTTY": "no", "AllowStreamLocalForwarding": "no"}),
    Host("AllowTcpForwarding local", options={"AllowTcpForwarding": "local", "AllowAgentForwarding": "no"}),
    Host("closes idle sessions", options={"ChannelTimeout": "session:*=3"}),
    Host("closes idle connections", options={"ClientAliveInterval": "1", "ClientAliveCountMax": "1"}),
    Host(
        "a password",
        options={"PasswordAuthentication": "yes", "PubkeyAuthentication": "no"},
        has_password=True,
        spec={"identity_files": (), "password_env": "GPUMESH_TEST_PASSWORD"},
        needs=("openssl",),
    ),
    Host("a key in an agent only", agent=True),
    Host("no nvidia-smi", smi=None, expected=Expected(code="nvidia-smi-missing", gpus=0)),
    Host(
        "an nvidia-smi that never stops writing",
        smi="yes no table",
        expected=Expected(code="gpu-unreadable", text="far more than a table", gpus=0),
    ),
    Host("dropbear", dropbear=True, files={".bashrc": "PATH=$HOME/bin:$PATH\n"}, needs=("dropbear",)),
    Host(
        "dropbear, zsh",
        dropbear=True,
        shell="zsh",
        files={".zshenv": "PATH=$HOME/bin:$PATH\n"},
        needs=("dropbear", "zsh"),
    ),
    Host(
        "dropbear, a forced command",
        dropbear=True,
        arguments=("-c", "echo only forwarding here"),
        expected=NO_COMMANDS,
        needs=("dropbear",),
    ),
    Host(
        "dropbear, a password",
        dropbear=True,
        files={".bashrc": "PATH=$HOME/bin:$PATH\n"},
        has_password=True,
        spec={"identity_files": (), "password_env": "GPUMESH_TEST_PASSWORD"},
        needs=("dropbear", "openssl"),
    ),
]


@pytest.fixture(scope="module")
def agent_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the agent of a host's key listens. Set before ``pool``, whose processes get the environment."""
    path = tmp_path_factory.mktemp("a") / "s"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSH_AUTH_SOCK", str(path))
        environment.setenv("GPUMESH_TEST_PASSWORD", PASSWORD)
        yield path


@contextlib.contextmanager
def agent_with_key(socket: Path, key: Path) -> Iterator[None]:
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            if is_listening(socket):
                break
            time.sleep(0.01)
        subprocess.run(["ssh-add", "-q", str(key)], check=True, timeout=20)
        yield
    finally:
        agent.kill()
        agent.wait()


def test_there_are_twenty_odd_hosts() -> None:
    assert len({host.name for host in HOSTS}) == len(HOSTS) > 20


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("host", [pytest.param(host, id=host.name, marks=needs(*host.needs)) for host in HOSTS])
async def test_a_host_is_served_and_what_is_said_of_it_is_true(
    host: Host, tmp_path: Path, agent_socket: Path, runtime: Path, pool: WorkerPool, backend: int
) -> None:
    del runtime

    async def visit(transport: TransportKind) -> None:
        expected = host.expects(transport)
        async with visiting(host, server, pool, backend, transport) as made:
            reconnects = host.reconnects_openssh if transport is TransportKind.OPENSSH else 0
            if reconnects:
                await made.probe_until(lambda report: report.answer is expected.answer)
            for _ in range(2):
                report = await made.probe()
                assert (report.answer, len(report.gpus)) == (expected.answer, expected.gpus), (transport, report)
                assert [finding.code for finding in report.findings] == ([expected.code] if expected.code else [])
                assert expected.text in (report.error or "")
                assert "\033" not in repr(report)
            output = await made.run("sh", "-c", "echo $((6*7))")
            assert (b"42" in (output or b"").split()) == expected.exec_works, (transport, output)
            assert made.watched.tunnel.state.reconnects == reconnects

    async with running(host, tmp_path) as (_account, server):
        agent = agent_with_key(agent_socket, server.identity) if host.agent else contextlib.nullcontext()
        with agent:
            async with asyncio.TaskGroup() as visits:
                for transport in TransportKind:
                    visits.create_task(visit(transport))
