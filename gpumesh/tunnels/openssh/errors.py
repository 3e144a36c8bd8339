"""What ``ssh`` says on stderr, as our typed errors. Pure. The texts are OpenSSH's own, of 7.9 to 9.9."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gpumesh.errors import (
    AuthRefused,
    ConnectRefused,
    ConnectTimeout,
    ForwardingForbidden,
    HostKeyChanged,
    HostKeyRevoked,
    HostKeyUnknown,
    HostUnreachable,
    HostUnresolved,
    KeyUnreadable,
    NotSsh,
    TransportUnsupported,
    TunnelError,
    TunnelLost,
)

FORBIDDEN_TEXT = "administratively prohibited"
NO_SESSION_PATTERN = re.compile(
    r"exec request failed on channel|channel \d+: open failed|session request failed|Session open refused",
    re.IGNORECASE,
)

_Make = Callable[[str, str], TunnelError]  # (where, ssh's own line)

# In order: a line further up decides over what follows from it ("Host key verification failed", "Permission denied").
_MEANINGS: tuple[tuple[re.Pattern[str], _Make], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), make)
    for pattern, make in (
        (
            r"REVOKED HOST KEY|host key for .* (was|is) revoked",
            lambda where, _: HostKeyRevoked(
                f"the host key of {where} is marked as revoked",
                hint="do not connect; if the mark is wrong, remove the @revoked line from known_hosts",
            ),
        ),
        (
            r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed",
            lambda where, _: HostKeyChanged(
                f"the host key of {where} is not the one on record",
                hint="normal for a pod that was reset, an attack otherwise: compare it, then `gpumesh trust` the node",
            ),
        ),
        (
            r"no .* host key is known for|host key verification failed|authenticity of host",
            lambda where, _: HostKeyUnknown(
                f"the host key of {where} is not known", hint="compare its fingerprint and accept it: `gpumesh trust`"
            ),
        ),
        (
            r"doesn't support PTY",
            lambda where, _: TransportUnsupported(
                f"{where} gives terminals only: no commands and no forwarding",
                hint="on RunPod use *SSH over exposed TCP*: root@IP with the external port, not …@ssh.runpod.io",
            ),
        ),
        (
            r"bad configuration option|terminating, \d+ bad|Bad .* specification|unsupported option|Missing argument",
            lambda _, line: TransportUnsupported(
                f"ssh does not accept its configuration: {line}", hint="check ~/.ssh/config with `ssh -G HOST`"
            ),
        ),
        (
            r"too long for Unix domain socket|ControlPath too long",
            lambda _, line: TransportUnsupported(
                f"the path of a socket is too long: {line}", hint="set XDG_RUNTIME_DIR to a folder with a shorter name"
            ),
        ),
        (
            r"could not resolve hostname|name or service not known|nodename nor servname",
            lambda where, _: HostUnresolved(
                f"DNS does not know the host {where}",
                hint="check `ssh.host` for a misspelling, and that this machine is online",
            ),
        ),
        (
            r"(connect to host|connect failed).*connection refused",
            lambda where, _: ConnectRefused(
                f"nothing listens on {where}",
                hint="check the port (a pod's changes when it restarts), and that the host's sshd is running",
            ),
        ),
        (
            r"(connect to host|connect failed).*timed out|timed out during banner exchange|connection timed out",
            lambda where, _: ConnectTimeout(
                f"no answer from {where}",
                hint="the host is off, or a firewall drops the connection; check host and port",
            ),
        ),
        (
            r"no route to host|network is unreachable|network is down|cannot assign requested address",
            lambda where, _: HostUnreachable(f"no route to {where}", hint="check this machine's network or VPN"),
        ),
        (
            r"no matching (key exchange|host key|cipher|mac)",
            lambda where, line: TransportUnsupported(
                f"{where} and this ssh have no algorithm in common: {line}", hint="allow it in ~/.ssh/config"
            ),
        ),
        (
            r"load key .*: |unprotected private key|no such identity|incorrect passphrase|bad permissions",
            lambda where, line: KeyUnreadable(
                f"the key for {where} cannot be used: {line}",
                hint="check `ssh.identity_file`, its mode (0600) and the variable that `ssh.passphrase_env` names",
            ),
        ),
        (
            r"permission denied|too many authentication failures|no supported authentication methods",
            lambda where, line: AuthRefused(
                f"{where} refuses the login: {line}",
                hint="check `ssh.user`, and that our public key is in the host's authorized_keys",
            ),
        ),
        (
            FORBIDDEN_TEXT,
            lambda where, _: ForwardingForbidden(
                f"{where} forbids forwarding", hint="its sshd_config has AllowTcpForwarding no, or PermitOpen"
            ),
        ),
        (
            r"exceeded MaxStartups|too many logins",
            lambda where, _: ConnectRefused(
                f"{where} has too many logins under way (MaxStartups)", hint="it is tried again"
            ),
        ),
        (
            r"protocol mismatch|banner line contains invalid|invalid protocol|remote protocol version",
            lambda where, line: NotSsh(
                f"{where} does not speak SSH: {line}", hint="check `ssh.port`: this looks like another service"
            ),
        ),
        (
            r"(kex_exchange_identification|banner exchange).*(closed|reset)|ssh_exchange_identification",
            lambda where, _: ConnectRefused(
                f"{where} closed the connection before the SSH greeting",
                hint="too many logins at once (MaxStartups), a block list on the host, or not an SSH port",
            ),
        ),
        (
            r"timeout, server .* not responding",
            lambda where, _: TunnelLost(f"{where} does not answer any more", hint="it is tried again"),
        ),
        (
            r"connection (to .* )?(reset|closed)|broken pipe|closed by remote host|connection aborted",
            lambda where, line: TunnelLost(f"the connection to {where} broke: {line}"),
        ),
    )
)


def error_from_stderr(lines: Sequence[str], where: str, *, was_up: bool = False) -> TunnelError:
    """The error that ``ssh``'s last words (made printable already) stand for. ``was_up``: it had been connected, so
    that whatever happened, the connection was lost."""
    if was_up:
        last = lines[-1] if lines else "ssh ended without a word"
        return TunnelLost(f"the connection to {where} broke: {last}")
    for pattern, make in _MEANINGS:
        for line in lines:
            if pattern.search(line):
                return make(where, line)
    last = lines[-1] if lines else "it says nothing"
    return TunnelError(f"ssh does not connect to {where}: {last}", hint="try it by hand: `ssh -v` to the same host")
