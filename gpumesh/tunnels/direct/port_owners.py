"""Which process listens on a local port, and whether that means that its server runs on this machine.

Linux tells through /proc, for processes of our own user (for root: of all). Elsewhere it is unknown, and unknown is
not "here": a wrong GPU in the table is worse than none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

# By the kernel's name of the process (at most 15 characters): it only passes bytes on, perhaps to another machine.
# fmt: off
PASSES_ON = frozenset(
    {
        "ssh", "sshd", "sshd-session", "autossh", "dropbear", "dbclient", "plink", "sshuttle", "socat", "nc",
        "ncat", "netcat", "nginx", "haproxy", "envoy", "traefik", "caddy", "apache2", "httpd", "squid",
        "stunnel", "stunnel4", "frpc", "frps", "chisel", "cloudflared", "ngrok", "tailscaled", "wireproxy",
        "gost", "kubectl", "boring", "mole", "xinetd", "inetd", "systemd-socket-", "wslrelay", "gpumesh",
        "redir", "rinetd", "3proxy", "v2ray", "xray",
    }
)
# fmt: on
# By the program or module that stands in the command line, for those that run inside an interpreter.
PASSES_ON_MODULES = frozenset({"gpumesh", "sshtunnel", "sshuttle", "mitmproxy", "mitmdump", "mitmweb", "litellm"})
# Accounts that distributions and installers make for an inference server, and for nothing else.
SERVER_ACCOUNTS = frozenset({"ollama"})


@dataclass(frozen=True, slots=True)
class PortOwner:
    """``is_local``: the server behind the port runs on this machine, as far as can be told; else ``reason`` why not."""

    is_local: bool
    reason: str = ""


HostPort = tuple[str, int]
"""A host, which is a loopback address or ``localhost``, and a port."""
_Sockets = frozenset[tuple[int, int]]
"""(inode, uid) of each that would get a connection to a place."""


class PortOwnerLookup:
    """Of the processes that listen on local ports.

    Looking through all processes' descriptors takes tens of ms, so what was found stands for as long as the listening
    sockets are the same ones (by their inodes), and is looked for at once for all places that are asked for.
    """

    def __init__(self, *, proc: Path = Path("/proc"), platform: str = sys.platform) -> None:
        self._proc = proc
        self._platform = platform
        self._known: dict[HostPort, tuple[_Sockets, PortOwner]] = {}

    def find_owners(self, places: Collection[HostPort]) -> dict[HostPort, PortOwner]:
        """Blocks; may be called from any thread, one at a time."""
        if self._platform != "linux":
            return {
                (host, port): PortOwner(False, f"which process listens on port {port} is not known on this system")
                for host, port in places
            }
        listening = _listening(self._proc, places)
        known = {place: self._known[place] for place in places if place in self._known}
        new = {place: found for place, found in listening.items() if place not in known or known[place][0] != found}
        holders = _holders(self._proc, {inode for found in new.values() for inode, _uid in found})
        told: dict[HostPort, PortOwner] = {}
        for place, sockets in new.items():
            known.pop(place, None)
            try:
                owner = self._owner(place[1], sockets, holders)
            except OSError:  # not kept: it is looked for again
                told[place] = PortOwner(False, f"the process that listened on port {place[1]} has just ended")
            else:
                known[place] = sockets, owner
        self._known = known
        return told | {place: owner for place, (_sockets, owner) in known.items()}

    def _owner(self, port: int, sockets: _Sockets, holders: Mapping[int, list[int]]) -> PortOwner:
        """Raises OSError when a process that held the port is gone."""
        if not sockets:
            return PortOwner(False, f"which process listens on port {port} is not known")
        pids = {pid for inode, _uid in sockets for pid in holders.get(inode, ())}
        if not pids:
            if all(_account(uid) in SERVER_ACCOUNTS for _inode, uid in sockets):
                return PortOwner(True)
            return PortOwner(
                False, f"another user's process listens on port {port}, perhaps a tunnel to another machine"
            )
        for pid in sorted(pids):
            name = _name_if_it_passes_on(self._proc / str(pid))
            if name is not None:
                return PortOwner(False, f"{name} listens on port {port}, which may lead to another machine")
        return PortOwner(True)


def _listening(proc: Path, places: Collection[HostPort]) -> dict[HostPort, _Sockets]:
    found: dict[HostPort, set[tuple[int, int]]] = {place: set() for place in places}
    hosts: dict[int, list[str]] = {}
    for host, port in places:
        hosts.setdefault(port, []).append(host)
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            if " 0A " not in line:  # most are connections; all that is read of those is this
                continue
            fields = line.split()
            if len(fields) < 10 or fields[3] != "0A":  # TCP_LISTEN
                continue
            address, _colon, number = fields[1].partition(":")
            port = int(number, 16)
            for host in hosts.get(port, ()):
                if _covers(_kernel_address(address), host):
                    found[host, port].add((int(fields[9]), int(fields[7])))
    return {place: frozenset(sockets) for place, sockets in found.items()}


def _kernel_address(text: str) -> IPv4Address | IPv6Address:
    """/proc/net/tcp writes each 32-bit word of an address as a hexadecimal number of the machine's byte order."""
    raw = b"".join(int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8))
    address = ip_address(raw)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _covers(bound: IPv4Address | IPv6Address, host: str) -> bool:
    if bound.is_unspecified or host.rstrip(".").lower() == "localhost":
        return bound.is_unspecified or bound.is_loopback
    return bound == ip_address(host)


def _holders(proc: Path, inodes: Collection[int]) -> dict[int, list[int]]:
    """The processes that hold each of these sockets."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    holders: dict[int, list[int]] = {}
    for folder in proc.iterdir() if wanted else ():
        if not folder.name.isdigit():
            continue
        try:
            with os.scandir(folder / "fd") as entries:
                links = {_link(entry) for entry in entries}
        except OSError:  # another user's, or gone
            continue
        for link in links & wanted.keys():
            holders.setdefault(wanted[link or ""], []).append(int(folder.name))
    return holders


def _link(entry: os.DirEntry[str]) -> str | None:
    try:
        return os.readlink(entry)
    except OSError:  # closed since it was listed; the process's others still count
        return None


def _name_if_it_passes_on(process: Path) -> str | None:
    """Raises OSError when it is gone."""
    name = (process / "comm").read_text().strip()
    words = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:5]
    # `python -m gpumesh.cli.main`, `/usr/bin/gpumesh`, and the title that a worker of ours gives itself.
    modules = {word.rpartition("/")[2].split(".")[0].split(" ")[0] for word in (*words, name)}
    return name if name in PASSES_ON or modules & PASSES_ON_MODULES else None


def _account(uid: int) -> str | None:
    import pwd  # POSIX only

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
