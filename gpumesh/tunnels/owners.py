"""Which process listens on a local port, and whether that means that its server runs on this machine.

Linux tells through /proc, for processes of our own user (for root: of all). Elsewhere it is unknown, and unknown is
not "here": a wrong GPU in the table is worse than none.
"""

from __future__ import annotations

import os
import sys
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
class Owner:
    """``is_here``: the server behind the port runs on this machine, as far as can be told; else ``reason`` why not."""

    is_here: bool
    reason: str = ""


class PortOwner:
    """Of the process that listens on ``host``:``port``, a loopback address or ``localhost``.

    Looking through all processes' descriptors takes tens of ms, so what was found stands for as long as the listening
    socket is the same one (by its inode). ``ask`` blocks, and may be called from any thread, one at a time.
    """

    def __init__(self, host: str, port: int, *, proc: Path = Path("/proc"), platform: str = sys.platform) -> None:
        self._host = host
        self._port = port
        self._proc = proc
        self._platform = platform
        self._known: tuple[set[tuple[int, int]], Owner] | None = None

    def ask(self) -> Owner:
        if self._platform != "linux":
            return Owner(False, f"which process listens on port {self._port} is not known on this system")
        listening = _listening(self._proc, self._host, self._port)
        if self._known is None or self._known[0] != listening:
            try:
                self._known = listening, self._look(listening)
            except OSError:
                self._known = None
                return Owner(False, f"the process that listened on port {self._port} has just ended")
        return self._known[1]

    def _look(self, listening: set[tuple[int, int]]) -> Owner:
        """Raises OSError when a process that held the port is gone."""
        if not listening:
            return Owner(False, f"which process listens on port {self._port} is not known")
        pids = _pids_of(self._proc, {inode for inode, _uid in listening})
        if not pids:
            if all(_account(uid) in SERVER_ACCOUNTS for _inode, uid in listening):
                return Owner(True)
            reason = f"another user's process listens on port {self._port}, perhaps a tunnel to another machine"
            return Owner(False, reason)
        for pid in pids:
            name = _name_if_it_passes_on(self._proc / str(pid))
            if name is not None:
                return Owner(False, f"{name} listens on port {self._port}, which may lead to another machine")
        return Owner(True)


def _listening(proc: Path, host: str, port: int) -> set[tuple[int, int]]:
    """(inode, uid) of each socket that would get a connection to this address."""
    found = set()
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) < 10 or fields[3] != "0A":  # TCP_LISTEN
                continue
            address, _colon, number = fields[1].partition(":")
            if int(number, 16) == port and _covers(_kernel_address(address), host):
                found.add((int(fields[9]), int(fields[7])))
    return found


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


def _pids_of(proc: Path, inodes: set[int]) -> list[int]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    pids = []
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            with os.scandir(folder / "fd") as entries:
                links = {_link(entry) for entry in entries}
        except OSError:  # another user's, or gone
            continue
        if not wanted.isdisjoint(links):
            pids.append(int(folder.name))
    return pids


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
