"""Finds the process that listens on a local port, and whether the server behind the port runs on this machine.

On Linux, /proc shows this for processes of our own user (to root: of all users). On other systems the owner is unknown.
An unknown owner does not count as "on this machine": a wrong GPU in the table is worse than no GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from gpumesh.tunnels.local_system.proc_net import parse_table_address

# Names of processes, as the kernel keeps them (at most 15 characters), that only pass bytes on, perhaps to another
# machine.
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
# The same for programs that run in an interpreter. The name is that of the program or module in the command line.
FORWARDING_MODULES = frozenset({"gpumesh", "sshtunnel", "sshuttle", "mitmproxy", "mitmdump", "mitmweb", "litellm"})
# Accounts that distributions and installers create for an inference server only.
SERVER_ACCOUNTS = frozenset({"ollama"})


@dataclass(frozen=True, slots=True)
class PortOwner:
    """``is_local``: as far as we can tell, the server behind the port runs on this machine. If not, ``reason`` says why
    we think so."""

    is_local: bool
    reason: str = ""


HostPort = tuple[str, int]
"""A host, which is a loopback address or ``localhost``, and a port."""
_Sockets = frozenset[tuple[int, int]]
"""The pairs (inode, uid) of the sockets that would get a connection to an address."""


class PortOwnerLookup:
    """Finds the processes that listen on local ports.

    A search through the descriptors of all processes takes tens of ms. So all addresses of a call are looked up
    together, and an answer is kept for as long as the listening sockets have the same inodes.
    """

    def __init__(self, *, proc: Path = Path("/proc"), platform: str = sys.platform) -> None:
        self._proc = proc
        self._platform = platform
        self._known_owners: dict[HostPort, tuple[_Sockets, PortOwner]] = {}

    def find_owners(self, addresses: Collection[HostPort]) -> dict[HostPort, PortOwner]:
        """The owner of each address. Blocks. May be called from any thread, but not from two threads at the same
        time."""
        if self._platform != "linux":
            return {
                (host, port): PortOwner(False, f"which process listens on port {port} is not known on this system")
                for host, port in addresses
            }
        listening = _find_listening_sockets(self._proc, addresses)
        kept_answers = {
            address: self._known_owners[address]
            for address, sockets in listening.items()
            if address in self._known_owners and self._known_owners[address][0] == sockets
        }
        changed = {address: sockets for address, sockets in listening.items() if address not in kept_answers}
        pids_by_inode = _find_holders(self._proc, {inode for sockets in changed.values() for inode, _uid in sockets})
        just_ended: dict[HostPort, PortOwner] = {}
        for address, sockets in changed.items():
            try:
                owner = self._decide_owner(address[1], sockets, pids_by_inode)
            except OSError:  # this answer is not kept, so that the next call looks again
                reason = f"the process that listened on port {address[1]} has just ended"
                just_ended[address] = PortOwner(False, reason)
            else:
                kept_answers[address] = sockets, owner
        self._known_owners = kept_answers
        return just_ended | {address: owner for address, (_sockets, owner) in kept_answers.items()}

    def _decide_owner(self, port: int, sockets: _Sockets, pids_by_inode: Mapping[int, list[int]]) -> PortOwner:
        """Decides from the sockets of a port. Raises OSError when a process that held the port has ended."""
        if not sockets:
            return PortOwner(False, f"which process listens on port {port} is not known")
        pids = {pid for inode, _uid in sockets for pid in pids_by_inode.get(inode, ())}
        if not pids:  # /proc hides the descriptors of other users' processes
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


def _find_listening_sockets(proc: Path, addresses: Collection[HostPort]) -> dict[HostPort, _Sockets]:
    """The sockets that would get a connection to each address."""
    sockets: dict[HostPort, set[tuple[int, int]]] = {address: set() for address in addresses}
    hosts_by_port: dict[int, list[str]] = {}
    for host, port in addresses:
        hosts_by_port.setdefault(port, []).append(host)
    for bound, port, inode, uid in _read_listening_sockets(proc):
        for host in hosts_by_port.get(port, ()):
            if _receives(bound, host):
                sockets[host, port].add((inode, uid))
    return {address: frozenset(pairs) for address, pairs in sockets.items()}


def _read_listening_sockets(proc: Path) -> Iterator[tuple[IPv4Address | IPv6Address, int, int, int]]:
    """The address, port, inode and uid of each listening TCP socket of this machine."""
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            if " 0A " not in line:  # a quick check, because most lines are connections
                continue
            fields = line.split()
            if len(fields) < 10 or fields[3] != "0A":  # TCP_LISTEN
                continue
            bound, port = parse_table_address(fields[1])
            yield bound, port, int(fields[9]), int(fields[7])


def _receives(bound: IPv4Address | IPv6Address, host: str) -> bool:
    """Whether a socket that is bound to this address gets connections to ``host``."""
    if bound.is_unspecified or host.rstrip(".").lower() == "localhost":
        return bound.is_unspecified or bound.is_loopback
    return bound == ip_address(host)


def _find_holders(proc: Path, inodes: Collection[int]) -> dict[int, list[int]]:
    """For each of these sockets, by inode, the pids of the processes that hold it."""
    inode_by_link = {f"socket:[{inode}]": inode for inode in inodes}
    pids_by_inode: dict[int, list[int]] = {}
    for folder in proc.iterdir() if inodes else ():
        if not folder.name.isdigit():
            continue
        try:
            with os.scandir(folder / "fd") as entries:
                open_files = {_read_link(entry) for entry in entries}
        except OSError:  # the process is another user's, or has ended
            continue
        for link in open_files & inode_by_link.keys():
            pids_by_inode.setdefault(inode_by_link[link or ""], []).append(int(folder.name))
    return pids_by_inode


def _read_link(entry: os.DirEntry[str]) -> str | None:
    try:
        return os.readlink(entry)
    except OSError:  # the file was closed after the listing; the process's other files still count
        return None


def _find_forwarder_name(process: Path) -> str | None:
    """The process's name if its program only passes bytes on; else ``None``. Raises OSError when the process has
    ended."""
    name = (process / "comm").read_text().strip()
    arguments = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:5]
    # `python -m gpumesh.cli.main`, `/usr/bin/gpumesh`, and the title that a worker of ours gives itself.
    modules = {text.rpartition("/")[2].split(".")[0].split(" ")[0] for text in (*arguments, name)}
    return name if name in FORWARDING_PROGRAMS or modules & FORWARDING_MODULES else None


def _find_account(uid: int) -> str | None:
    import pwd  # POSIX only

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
