"""Turns the lines that ``ssh`` prints on stderr into our typed errors. Pure. The texts are from OpenSSH 7.9 to 9.9."""

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
OPEN_FAILED_TEXT = "open failed"
TOO_MANY_TRIES_TEXT = "Too many authentication failures"
NO_TERMINAL_TEXT = "doesn't support PTY"  # RunPod's proxy, which gives terminals only
NO_SESSION_PATTERN = re.compile(
    r"exec request failed on channel|channel \d+: open failed|session request failed|Session open refused",
    re.IGNORECASE,
)

_MakeError = Callable[[str, str], TunnelError]  # the arguments: the destination, and the line that ssh printed

# Pairs of a pattern and the function that makes the error. The first pair whose pattern matches any line decides. Lines
# such as "Host key verification failed" or "Permission denied" often follow a line with the true cause, so the pairs
# for causes come first.
_ERRORS_BY_TEXT: tuple[tuple[re.Pattern[str], _MakeError], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), make_error)
    for pattern, make_error in (
        (
            r"REVOKED HOST KEY|host key for .* (was|is) revoked",
            lambda destination, _: HostKeyRevoked(
                f"the host key of {destination} is marked as revoked",
                hint="do not connect; if the mark is wrong, remove the @revoked line from known_hosts",
            ),
        ),
        (
            r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed",
            lambda destination, _: HostKeyChanged(
                f"the host key of {destination} is not the one on record",
                hint="normal for a pod that was reset, an attack otherwise: compare it, then `gpumesh trust` the node",
            ),
        ),
        (
            r"no .* host key is known for|host key verification failed|authenticity of host",
            lambda destination, _: HostKeyUnknown(
                f"the host key of {destination} is not known",
                hint="compare its fingerprint and accept it: `gpumesh trust`",
            ),
        ),
        (
            re.escape(NO_TERMINAL_TEXT),
            lambda destination, _: TransportUnsupported(
                f"{destination} gives terminals only: no commands and no forwarding",
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
            lambda destination, _: HostUnresolved(
                f"DNS does not know the host {destination}",
                hint="check `ssh.host` for a misspelling, and that this machine is online",
            ),
        ),
        (
            r"(connect to host|connect failed).*connection refused",
            lambda destination, _: ConnectRefused(
                f"nothing listens on {destination}",
                hint="check the port (a pod's changes when it restarts), and that the host's sshd is running",
            ),
        ),
        (
            r"(connect to host|connect failed).*timed out|timed out during banner exchange|connection timed out",
            lambda destination, _: ConnectTimeout(
                f"no answer from {destination}",
                hint="the host is off, or a firewall drops the connection; check host and port",
            ),
        ),
        (
            r"no route to host|network is unreachable|network is down|cannot assign requested address",
            lambda destination, _: HostUnreachable(
                f"no route to {destination}", hint="check this machine's network or VPN"
            ),
        ),
        (
            r"no matching (key exchange|host key|cipher|mac)",
            lambda destination, line: TransportUnsupported(
                f"{destination} and this ssh have no algorithm in common: {line}", hint="allow it in ~/.ssh/config"
            ),
        ),
        (
            r"load key .*: |unprotected private key|no such identity|incorrect passphrase|bad permissions",
            lambda destination, line: KeyUnreadable(
                f"the key for {destination} cannot be used: {line}",
                hint="check `ssh.identity_file`, its mode (0600) and the variable that `ssh.passphrase_env` names",
            ),
        ),
        (
            r"signing failed for|agent refused operation",
            lambda destination, line: AuthRefused(
                f"{destination} refuses the login, and a key could not sign: {line}",
                hint="unlock the agent and confirm what it asks, or plug the security token in and touch it",
            ),
        ),
        (
            r"permission denied|too many authentication failures|no supported authentication methods",
            lambda destination, line: AuthRefused(
                f"{destination} refuses the login: {line}",
                hint="check `ssh.user`, and that our public key is in the host's authorized_keys",
            ),
        ),
        (
            FORBIDDEN_TEXT,
            lambda destination, _: ForwardingForbidden(
                f"{destination} forbids forwarding", hint="its sshd_config has AllowTcpForwarding no, or PermitOpen"
            ),
        ),
        (
            r"exceeded MaxStartups|too many logins",
            lambda destination, _: ConnectRefused(
                f"{destination} has too many logins under way (MaxStartups)", hint="it is tried again"
            ),
        ),
        (
            r"protocol mismatch|banner line contains invalid|invalid protocol|remote protocol version",
            lambda destination, line: NotSsh(
                f"{destination} does not speak SSH: {line}", hint="check `ssh.port`: this looks like another service"
            ),
        ),
        (
            r"(kex_exchange_identification|banner exchange).*(closed|reset)|ssh_exchange_identification",
            lambda destination, _: ConnectRefused(
                f"{destination} closed the connection before the SSH greeting",
                hint="too many logins at once (MaxStartups), a block list on the host, or not an SSH port",
            ),
        ),
        (
            r"timeout, server .* not responding",
            lambda destination, _: TunnelLost(f"{destination} does not answer any more", hint="it is tried again"),
        ),
        (
            r"connection (to .* )?(reset|closed)|broken pipe|closed by remote host|connection aborted",
            lambda destination, line: TunnelLost(f"the connection to {destination} broke: {line}"),
        ),
    )
)


def error_from_stderr(lines: Sequence[str], destination: str, *, was_up: bool = False) -> TunnelError:
    """Makes the error that ``lines`` mean: the last lines of ssh's stderr, made printable.

    ``was_up``: ssh was connected before, so the error is ``TunnelLost`` whatever the lines say. If no text in the lines
    is known, the error is a plain ``TunnelError`` with the last line.
    """
    if was_up:
        last_line = lines[-1] if lines else "ssh ended without a word"
        # The host's own reason, after which ssh prints "Disconnected from …".
        reason = next((line for line in reversed(lines) if "Received disconnect from" in line), last_line)
        return TunnelLost(f"the connection to {destination} broke: {reason}")
    for pattern, make_error in _ERRORS_BY_TEXT:
        for line in lines:
            if pattern.search(line):
                return make_error(destination, line)
    last_line = lines[-1] if lines else "it says nothing"
    return TunnelError(
        f"ssh does not connect to {destination}: {last_line}", hint="try it by hand: `ssh -v` to the same host"
    )
