"""Finds the process that listens on a local port, and whether the server behind the port runs on this machine.

On Linux, /proc shows the process if it belongs to our own user (to root: any process). On other systems the owner is
unknown. An unknown owner does not count as "on this machine": a wrong GPU in the table is worse than no GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

from gpumesh.tunnels.local_system.listening_sockets import ListeningSocket, list_listening_sockets

# Programs that only pass bytes on, perhaps to another machine: the names of their processes, as the kernel keeps them
# (at most 15 characters).
# fmt: off
FORWARDING_PROGRAMS = frozenset(
    {
        "ssh", "sshd", "sshd-session", "autossh", "dropbear", "dbclient", "plink", "sshuttle", "socat", "nc",
        "ncat", "netcat", "nginx", "haproxy", "envoy", "traefik", "caddy", "apache2", "httpd", "squid",
        "stunnel", "stunnel4", "frpc", "frps", "chisel", "cloudflared", "ngrok", "tailscaled", "wireproxy",
        "gost", "kubectl", "boring", "mole", "xinetd", "inetd", "systemd-socket-", "wslrelay", "gpumesh",
        "redir", "rinetd", "3proxy", "v2ray", "xray",
    }
)
# fmt: on
# The same for programs that run in an interpreter: the names of the programs or modules in the command line.
FORWARDING_MODULES = frozenset({"gpumesh", "sshtunnel", "sshuttle", "mitmproxy", "mitmdump", "mitmweb", "litellm"})
# Accounts that distributions and installers create for an inference server only.
SERVER_ACCOUNTS = frozenset({"ollama"})


@dataclass(frozen=True, slots=True)
class PortOwner:
    """Whether the server behind a port runs on this machine, as far as we can tell. ``reason`` explains a "no"."""

    is_local: bool
    reason: str = ""


HostPort = tuple[str, int]
"""A host, which is a loopback address or ``localhost``, and a port."""
_Sockets = frozenset[tuple[int, int]]
"""The pairs (inode, uid) of the sockets that would get a connection to an address."""


class _KnownOwner(NamedTuple):
    sockets: _Sockets  # while the address has these sockets, ``owner`` is right
    owner: PortOwner


class PortOwnerLookup:
    """Finds the processes that listen on local ports.

    A search through the descriptors of all processes takes tens of ms. So all addresses of a call are looked up
    together, and an answer is kept for as long as the listening sockets have the same inodes.
    """

    def __init__(
        self,
        *,
        proc: Path = Path("/proc"),
        platform: str = sys.platform,
        list_sockets: Callable[[], Iterable[ListeningSocket]] = list_listening_sockets,
    ) -> None:
        self._proc = proc
        self._list_sockets = list_sockets
        self._platform = platform
        self._known_owners: dict[HostPort, _KnownOwner] = {}  # the cache of answers, by address

    def find_owners(self, addresses: Collection[HostPort]) -> dict[HostPort, PortOwner]:
        """Returns the owner of each address. Blocks. May be called from any thread, but not from two threads at the
        same time."""
        if self._platform != "linux":
            return {
                (host, port): PortOwner(False, f"which process listens on port {port} is not known on this system")
                for host, port in addresses
            }
        listening = _select_sockets(self._list_sockets(), addresses)
        known_owners: dict[HostPort, _KnownOwner] = {}
        changed: dict[HostPort, _Sockets] = {}
        for address, sockets in listening.items():
            known = self._known_owners.get(address)
            if known is not None and known.sockets == sockets:
                known_owners[address] = known
            else:
                changed[address] = sockets
        changed_inodes = {inode for sockets in changed.values() for inode, _uid in sockets}
        pids_by_inode = _find_pids(self._proc, changed_inodes)
        ended_owners: dict[HostPort, PortOwner] = {}
        for address, sockets in changed.items():
            _host, port = address
            try:
                owner = self._decide_owner(port, sockets, pids_by_inode)
            except OSError:  # this answer is not kept, so that the next call looks again
                reason = f"the process that listened on port {port} has just ended"
                ended_owners[address] = PortOwner(False, reason)
            else:
                known_owners[address] = _KnownOwner(sockets, owner)
        self._known_owners = known_owners
        return ended_owners | {address: known.owner for address, known in known_owners.items()}

    def _decide_owner(self, port: int, sockets: _Sockets, pids_by_inode: Mapping[int, list[int]]) -> PortOwner:
        """Decides whether the server runs on this machine, from a port's sockets and the processes that hold them.

        Raises OSError when one of these processes has ended meanwhile.
        """
        if not sockets:
            return PortOwner(False, f"which process listens on port {port} is not known")
        pids = {pid for inode, _uid in sockets for pid in pids_by_inode.get(inode, ())}
        if not pids:  # /proc hides the descriptors of other users' processes
            # True: every socket belongs to an account that runs nothing but an inference server.
            if all(_find_account(uid) in SERVER_ACCOUNTS for _inode, uid in sockets):
                return PortOwner(True)
            return PortOwner(
                False, f"another user's process listens on port {port}, perhaps a tunnel to another machine"
            )
        for pid in sorted(pids):
            name = _find_forwarder_name(self._proc / str(pid))
            if name is not None:
                return PortOwner(False, f"{name} listens on port {port}, which may lead to another machine")
        return PortOwner(True)


def _select_sockets(sockets: Iterable[ListeningSocket], addresses: Collection[HostPort]) -> dict[HostPort, _Sockets]:
    """For each of the addresses, the listening sockets that would get a connection to it."""
    selected: dict[HostPort, set[tuple[int, int]]] = {address: set() for address in addresses}
    hosts_by_port: dict[int, list[str]] = {}
    for host, port in addresses:
        hosts_by_port.setdefault(port, []).append(host)
    for bound, port, inode, uid in sockets:
        for host in hosts_by_port.get(port, ()):
            if _receives(bound, host):
                selected[host, port].add((inode, uid))
    return {address: frozenset(pairs) for address, pairs in selected.items()}


def _receives(bound: IPv4Address | IPv6Address, host: str) -> bool:
    """Whether a socket that is bound to this address gets connections to ``host``."""
    if bound.is_unspecified:  # 0.0.0.0 or ::, which stand for all addresses
        return True
    if host.rstrip(".").lower() == "localhost":
        return bound.is_loopback
    return bound == ip_address(host)


def _find_pids(proc: Path, inodes: Collection[int]) -> dict[int, list[int]]:
    """For each of these sockets, by inode, the pids of the processes that have it open."""
    pids_by_inode: dict[int, list[int]] = {}
    if not inodes:
        return pids_by_inode  # the search would take tens of ms
    inode_by_link = {f"socket:[{inode}]": inode for inode in inodes}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            with os.scandir(folder / "fd") as entries:
                links = {_read_link(entry) for entry in entries}
        except OSError:  # the process is another user's, or has ended
            continue
        for link in inode_by_link.keys() & links:
            pids_by_inode.setdefault(inode_by_link[link], []).append(int(folder.name))
    return pids_by_inode


def _read_link(entry: os.DirEntry[str]) -> str | None:
    """The target of a process's file descriptor, such as ``socket:[INODE]``; ``None`` if it was closed meanwhile."""
    try:
        return os.readlink(entry)
    except OSError:  # the file was closed after the listing; the process's other files still count
        return None


def _find_forwarder_name(process: Path) -> str | None:
    """The process's name if its program only passes bytes on; else ``None``. ``process``: its folder in /proc.

    Raises OSError when the process has ended.
    """
    name = (process / "comm").read_text().strip()
    command_line = (process / "cmdline").read_bytes().decode("utf-8", "replace")
    arguments = command_line.split("\0")[:5]  # the interpreter, its options, and the program or module
    # The name too: a worker of ours has set it to "gpumesh tunnel".
    modules = {_module_name(text) for text in (*arguments, name)}
    only_forwards = name in FORWARDING_PROGRAMS or bool(modules & FORWARDING_MODULES)
    return name if only_forwards else None


def _module_name(text: str) -> str:
    """The name of the program or module in an argument: ``gpumesh`` for ``gpumesh.cli.main`` (after ``python -m``), for
    ``/usr/bin/gpumesh``, and for ``gpumesh tunnel NODE``, the title that a worker of ours gives itself."""
    file_name = text.rpartition("/")[2]
    return file_name.split(".")[0].split(" ")[0]


def _find_account(uid: int) -> str | None:
    """The name of the user ``uid``; ``None`` if there is no such user."""
    import pwd  # POSIX only

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
