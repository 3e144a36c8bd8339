"""Asks a host on which ports its programs listen, so that only these are asked for an inference server.

The kernel's own tables in /proc/net are read: unlike ``ss`` and ``netstat``, they are on every Linux host, also in the
smallest container. The output is hostile until parsed: only numbers of ports come out, and not many.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gpumesh.errors import ExecError, TunnelDown
from gpumesh.probes.commands.combined_commands import Argv, CommandRunner
from gpumesh.probes.commands.host_commands import CommandsUnfinished, CommandsUnproven
from gpumesh.tunnels.local_system.proc_net import LISTEN_STATE

# Only the lines of listening sockets: a busy host has thousands of connections.
COMMAND: Argv = ("grep", "-h", " 0A ", "/proc/net/tcp", "/proc/net/tcp6")
MAX_LINES = 10_000
MAX_PORTS = 32  # that are asked for a server
FIRST_EPHEMERAL_PORT = 32768
"""From here on, Linux gives ports to programs that ask for any: Ollama's own runners listen there, and no server that a
person has set up."""

# Services that are no HTTP servers, or that log every stranger: sshd, mail, DNS, rpcbind, printers, databases.
_OTHER_SERVICES = frozenset(
    (
        21,
        22,
        23,
        25,
        53,
        110,
        111,
        139,
        143,
        445,
        465,
        587,
        631,
        873,
        993,
        995,
        2049,
        3306,
        3389,
        5432,
        6379,
        11211,
        27017,
    )
)
# An address that a connection to 127.0.0.1 reaches. The kernel writes words in the machine's byte order.
_REACHABLE = frozenset(
    {
        "00000000",
        "0100007F",
        "7F000001",
        "0" * 32,
        "0000000000000000FFFF00000100007F",
        "00000000000000000000FFFF7F000001",
        "0000000000000000FFFF000000000000",
        "00000000000000000000FFFF00000000",
    }
)


async def list_ports(commands: CommandRunner, *, timeout_s: float) -> frozenset[int] | None:
    """The ports on which the host listens for connections to 127.0.0.1; ``None`` if the host does not tell: it is no
    Linux host, runs no commands, or has not answered in ``timeout_s``. Never raises because of the host."""
    try:
        (output,) = await commands.run([COMMAND], timeout_s=timeout_s)
    except (CommandsUnfinished, CommandsUnproven, TunnelDown, ExecError):
        return None
    # grep's exit status is 2 on a host without IPv6, although it has written the other table's lines.
    return read_ports(output.output) or None


def read_ports(output: bytes) -> frozenset[int]:
    """The ports in the kernel's lines of listening sockets. Ignores all other lines. Never raises."""
    ports = set()
    for line in output.split(b"\n", MAX_LINES)[:MAX_LINES]:
        fields = line.decode("ascii", "replace").split()
        if len(fields) < 4 or fields[3] != f"{LISTEN_STATE:02X}":
            continue
        address, _, port_text = fields[1].partition(":")
        try:
            port = int(port_text, 16) if len(port_text) == 4 else 0
        except ValueError:
            continue
        if address in _REACHABLE and port > 0:
            ports.add(port)
    return frozenset(ports)


def choose_ports(listening: Collection[int], preferred: Iterable[int]) -> tuple[int, ...]:
    """The ports to ask for a server, at most ``MAX_PORTS``: first those of ``preferred`` that are in ``listening``, in
    their order, then the others that may belong to a server."""
    first = [port for port in dict.fromkeys(preferred) if port in listening]
    others = sorted(port for port in listening if port < FIRST_EPHEMERAL_PORT and port not in _OTHER_SERVICES)
    return tuple(dict.fromkeys((*first, *others)))[:MAX_PORTS]
