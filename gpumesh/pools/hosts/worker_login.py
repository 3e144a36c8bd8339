"""The way from the head straight to a worker: the head's host logs in there, with its own keys and its own ssh.

The head must not trust a host key that we do not know. So it gets the worker's key that is on our record, in a
known_hosts file of its own, in a temporary folder that is removed afterwards. It never asks a question (BatchMode).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpumesh.errors import TunnelError
from gpumesh.pools.hosts.route import HostRoute
from gpumesh.text.printable import printable
from gpumesh.topology import NodeSpec
from gpumesh.tunnels.known_hosts import KnownHost, read_known_hosts

LOGIN_TIMEOUT_S = 15.0
FORWARD_READY = "gpumesh-forward-ready"
"""The line that ``forward_argv`` prints when the head can connect to the worker's port."""

_ALIAS = "gpumesh-worker"
_LOGIN_WORKS = b"gpumesh-login-works"
_MAX_KEYS = 16

# $1: the number of keys; then the keys, and ssh's arguments. Sets d, the temporary folder, and $@, the command of ssh.
_PREPARE = (
    'umask 077; d=$(mktemp -d) || exit 1; trap "rm -rf \\"$d\\"" EXIT; trap "exit 143" HUP INT TERM; '
    f'c=$1; shift; while [ $c -gt 0 ]; do echo "{_ALIAS} $1" >>"$d/known_hosts"; shift; c=$((c-1)); done; '
    'set -- ssh -o "UserKnownHostsFile=\\"$d/known_hosts\\"" "$@"; '
)
# ssh runs in the background, so that a signal ends this script at once, and with it the folder.
_WAIT = "s=$! ; wait $s; exit $?"
# The worker's input never ends: FIFO that is open for writing, too. Otherwise ``cat`` there would end, and with it ssh.
_OPEN_INPUT = 'mkfifo "$d/in" && exec 5<>"$d/in" || exit 1; '


@dataclass(frozen=True, slots=True)
class WorkerLogin:
    """How the head would log in at a worker. ``host_keys`` are the keys on our record, in the form of known_hosts."""

    node: str
    user: str
    host: str
    port: int
    host_keys: tuple[str, ...]


def make_worker_login(node: NodeSpec, *, mesh: str) -> WorkerLogin | None:
    """The login for a worker; ``None`` if the head cannot do it: no SSH, a host behind a jump host, an address that is
    not known beforehand, or no host key on record. ``mesh``: the ``Topology.identity``."""
    ssh = node.ssh
    if ssh is None or ssh.proxy_jump or not ssh.host or ssh.address_from is not None:
        return None
    try:
        keys = read_known_hosts(*ssh.known_hosts_files).keys(KnownHost(ssh.host, ssh.port, node.name, mesh))
    except TunnelError:  # the file cannot be read now
        return None
    if not keys or ssh.host.startswith("-") or ssh.user.startswith("-"):
        return None
    texts = tuple(key.public_key_text for key in keys[:_MAX_KEYS])
    return WorkerLogin(node.name, ssh.user, ssh.host, ssh.port, texts)


async def may_log_in(head: HostRoute, login: WorkerLogin, *, timeout_s: float = LOGIN_TIMEOUT_S) -> str | None:
    """Tries whether the head's host may log in at the worker. Returns ``None`` if it may, or else the reason.

    Raises TunnelDown, and ExecError when the head does not answer.
    """
    argv = login_argv(login, f'"$@" </dev/null & {_WAIT}', f"echo {_LOGIN_WORKS.decode()}")
    result = await head.exec(argv, timeout_s=timeout_s)
    if result.exit_status == 0 and _LOGIN_WORKS in result.stdout:
        return None
    lines = [printable(line) for line in result.stderr.splitlines()[-20:]]
    return next((line for line in reversed(lines) if line), f"ssh ended with status {result.exit_status}")


def forward_argv(login: WorkerLogin, *, head_port: int, worker_port: int) -> tuple[str, ...]:
    """The command that leads ``head_port`` of the head's loopback to ``worker_port`` of the worker's loopback, for
    ``run_guarded``. It prints FORWARD_READY when the way is open, and ends when the connection does.

    A session is open all the time, because sshd delays small packets on a connection without one (40 ms each).
    """
    script = f'{_OPEN_INPUT}"$@" <&5 & {_WAIT}'
    options = ("-L", f"127.0.0.1:{head_port}:127.0.0.1:{worker_port}", "-o", "ExitOnForwardFailure=yes")
    return login_argv(login, script, f"echo {FORWARD_READY}; exec cat", options)


def login_argv(login: WorkerLogin, script: str, command: str, options: Sequence[str] = ()) -> tuple[str, ...]:
    """The command that runs ``script`` on the head's host. In the script, ``"$@"`` is the ssh that runs ``command`` on
    the worker, and d is a temporary folder. ``command`` is a command line for the worker's login shell."""
    settings = {
        "BatchMode": "yes",
        "HostKeyAlias": _ALIAS,
        "StrictHostKeyChecking": "yes",
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
        "ConnectTimeout": "6",
        "ServerAliveInterval": "2",
        "ServerAliveCountMax": "3",
        "ControlMaster": "no",
        "ControlPath": "none",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PermitLocalCommand": "no",
        "RequestTTY": "no",
        "RemoteCommand": "none",
        "LogLevel": "ERROR",
    }
    arguments = [argument for name, value in settings.items() for argument in ("-o", f"{name}={value}")]
    arguments += [*options, "-p", str(login.port), "-l", login.user, "--", login.host, command]
    keys = (str(len(login.host_keys)), *login.host_keys)
    return ("sh", "-c", _PREPARE + script, "gpumesh-login", *keys, *arguments)
