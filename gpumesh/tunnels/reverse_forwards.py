"""The errors of reverse forwards (``transport.ReverseForward``), for both transports. Pure.

SSH gives no reason when a host does not listen for us. OpenSSH's sshd sends the reason as a text for a log (RFC 4253,
section 11.3), also when its option GatewayPorts makes it listen at all addresses of the host.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpumesh.errors import ReverseForwardRefused
from gpumesh.text.printable import printable
from gpumesh.tunnels.remote_commands.host_text import add_host_text

BIND_ADDRESS = "127.0.0.1"  # never a name, and never all addresses: only programs of the host itself may connect

_DISABLED_TEXTS = ("disabled port forwarding", "port forwarding refused")
_WILDCARD_TEXT = "overridden by server GatewayPorts"


def make_refused_error(address: str, port: int, lines: Iterable[str | bytes]) -> ReverseForwardRefused:
    """The error for a host that does not listen at ``port``. ``address`` is the host's; ``lines`` are its texts."""
    lines = list(lines)
    if any(text in printable(line) for line in lines for text in _DISABLED_TEXTS):
        return ReverseForwardRefused(
            f"the sshd at {address} forbids reverse forwarding (a port of its own that leads to us)",
            hint="allow it in the host's sshd_config: AllowTcpForwarding yes (or remote), and PermitListen",
        )
    error = ReverseForwardRefused(
        f"the sshd at {address} does not listen at {BIND_ADDRESS}:{port} for us",
        hint="another program on the host has the port, or its sshd_config has AllowTcpForwarding no (or local)",
    )
    return add_host_text(error, lines)


def ensure_bound(address: str, port: int, lines: Iterable[str | bytes]) -> None:
    """Raises ReverseForwardRefused if the host's texts say that it listens at more addresses than ``BIND_ADDRESS``."""
    if any(_WILDCARD_TEXT in printable(line) for line in lines):
        raise ReverseForwardRefused(
            f"the sshd at {address} would open port {port} to its whole network (GatewayPorts yes)",
            hint="set GatewayPorts no, or clientspecified, in the host's sshd_config",
        )
