"""Which process listens on a local port: with real sockets and processes, and with a fake /proc for the rest."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.tunnels.direct import port_owners
from gpumesh.tunnels.direct.port_owners import PortOwner, PortOwnerLookup
from gpumesh.tunnels.local_system.listening_sockets import ListeningSocket, read_listening_sockets


def find_owner(ports: PortOwnerLookup, host: str = "127.0.0.1", port: int = 11434) -> PortOwner:
    return ports.find_owners([(host, port)])[host, port]


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@linux_only
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_a_server_on_this_machine(address: str) -> None:
    """A server in plain Python: neither its name nor its arguments are those of a forwarder."""
    script = (
        "import socket, sys; s = socket.create_server((sys.argv[1], 0), family=int(sys.argv[2]));"
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, address, str(int(family)),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    port = int(await asyncio.wait_for(server.stdout.readline(), 20))
    loopback = "::1" if ":" in address else "127.0.0.1"
    assert find_owner(PortOwnerLookup(), loopback, port) == PortOwner(True)
    assert find_owner(PortOwnerLookup(), "localhost", port).is_local
    if address == "127.0.0.1":
        other = find_owner(PortOwnerLookup(), "127.0.0.2", port)
        assert (other.is_local, "not known" in other.reason) == (False, True)
    server.kill()
    await server.communicate()
    gone = find_owner(PortOwnerLookup(), loopback, port)
    assert not gone.is_local
    assert str(port) in gone.reason


def test_other_systems_do_not_know_the_owner() -> None:
    owner = find_owner(PortOwnerLookup(platform="darwin"))
    assert not owner.is_local
    assert "not known" in owner.reason


class FakeProc:
    """A /proc. ``listen`` adds a socket, ``process`` adds a process that holds sockets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables = {"tcp": ["header"], "tcp6": ["header"]}
        (folder / "net").mkdir(parents=True)
        self._write()

    def _write(self) -> None:
        for name, lines in self._tables.items():
            (self.folder / "net" / name).write_text("\n".join(lines) + "\n")

    def listen(self, address: str, port: int, inode: int, *, uid: int = 1000, state: str = "0A") -> None:
        raw = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        words = [raw[start : start + 4] for start in range(0, len(raw), 4)]
        kernel = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
        any_address, zeros = "0" * len(kernel), "00000000:00000000 00:00000000 00000000"
        line = f"  0: {kernel}:{port:04X} {any_address}:0000 {state} {zeros} {uid} 0 {inode} 1"
        self._tables["tcp6" if ":" in address else "tcp"].append(line)
        self._write()

    def process(self, pid: int, name: str, *arguments: str, inodes: tuple[int, ...]) -> None:
        folder = self.folder / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text(f"{name[:15]}\n")
        (folder / "cmdline").write_bytes(b"".join(argument.encode() + b"\0" for argument in arguments))
        (folder / "fd" / "0").symlink_to("/dev/null")
        for number, inode in enumerate(inodes, start=1):
            (folder / "fd" / str(number)).symlink_to(f"socket:[{inode}]")

    def owner(self, host: str = "127.0.0.1", port: int = 11434) -> PortOwner:
        return find_owner(self.ports(), host, port)

    def ports(self) -> PortOwnerLookup:
        return PortOwnerLookup(proc=self.folder, platform="linux", list_sockets=self.list_sockets)

    def list_sockets(self) -> Iterator[ListeningSocket]:
        return read_listening_sockets(self.folder)


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ssh", ("ssh", "-N", "-L", "11434:localhost:11434", "gpu")),
        ("autossh", ("autossh", "-M0", "gpu")),
        ("sshd", ("sshd: me",)),  # someone's -R
        ("socat", ("socat", "TCP-LISTEN:11434", "TCP:gpu:11434")),
        ("nginx", ("nginx: worker process",)),
        ("kubectl", ("kubectl", "port-forward", "pod/x", "11434")),
        ("python3", ("/usr/bin/python3", "-m", "sshtunnel", "-U", "me")),
        ("python3", ("/usr/bin/python3", "/home/me/.local/bin/sshuttle", "-r", "gpu")),
        ("python", ("python", "-m", "gpumesh.cli.main", "up")),
        ("gpumesh", ("/home/me/.venv/bin/python", "/home/me/.venv/bin/gpumesh", "up")),
        ("gpumesh tunnel ", ("gpumesh tunnel iceland",)),
        ("systemd-socket-", ("/lib/systemd/systemd-socket-proxyd", "gpu:11434")),
    ],
)
def test_a_forwarding_process_is_not_local(proc: FakeProc, name: str, arguments: tuple[str, ...]) -> None:
    proc.listen("127.0.0.1", 11434, 77)
    proc.process(42, name, *arguments, inodes=(76, 77))
    owner = proc.owner()
    assert not owner.is_local
    assert name[:15].strip() in owner.reason
    assert "11434" in owner.reason


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ollama", ("/usr/local/bin/ollama", "serve")),
        ("llama-server", ("llama-server", "--port", "11434")),
        ("python3", ("python3", "-m", "vllm.entrypoints.openai.api_server", "--host", "0.0.0.0")),
        ("docker-proxy", ("docker-proxy", "-host-port", "11434")),  # leads to a container of this machine
    ],
)
def test_a_server_process_is_local(proc: FakeProc, name: str, arguments: tuple[str, ...]) -> None:
    proc.listen("0.0.0.0", 11434, 77)
    proc.process(42, name, *arguments, inodes=(77,))
    assert proc.owner().is_local


def test_a_process_of_another_user_is_local_only_under_a_servers_account(
    proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {999: "ollama", 1001: "somebody"}
    monkeypatch.setattr(port_owners, "_find_account", names.get)
    proc.listen("127.0.0.1", 11434, 77, uid=999)
    assert proc.owner().is_local
    proc.listen("127.0.0.1", 8080, 78, uid=1001)
    owner = proc.owner(port=8080)
    assert not owner.is_local
    assert "another user" in owner.reason
    proc.listen("127.0.0.1", 8081, 79, uid=4242)  # a uid without an account
    assert not proc.owner(port=8081).is_local


def test_a_socket_that_a_forwarder_holds_too_is_not_local(proc: FakeProc) -> None:
    """With SO_REUSEPORT, or an inherited socket, the kernel chooses the process."""
    proc.listen("127.0.0.1", 11434, 77)
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    proc.process(43, "ssh", "ssh", "-L", "x", inodes=(77,))
    assert not proc.owner().is_local


def test_only_listening_sockets_count(proc: FakeProc) -> None:
    proc.listen("127.0.0.1", 11434, 77, state="01")  # an established connection
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    assert "not known" in proc.owner().reason


def test_ipv4_clients_reach_an_ipv6_socket(proc: FakeProc) -> None:
    proc.listen("::ffff:127.0.0.1", 11434, 77)
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    assert proc.owner().is_local
    proc.listen("::", 8080, 78)
    proc.process(43, "ollama", "ollama", "serve", inodes=(78,))
    assert proc.owner(port=8080).is_local


def test_a_process_that_just_ended_and_malformed_tables(proc: FakeProc) -> None:
    proc.listen("127.0.0.1", 11434, 77)
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    (proc.folder / "42" / "comm").unlink()
    assert "just ended" in proc.owner().reason
    (proc.folder / "net" / "tcp").write_text("header\nshort line\n")
    (proc.folder / "net" / "tcp6").unlink()
    assert not proc.owner().is_local


def test_an_owner_is_kept_while_the_socket_is_the_same(proc: FakeProc) -> None:
    proc.listen("127.0.0.1", 11434, 77)
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    ports = proc.ports()
    assert find_owner(ports).is_local
    (proc.folder / "42" / "comm").write_text("ssh\n")  # the name is not read again
    assert find_owner(ports).is_local
    proc.listen("127.0.0.1", 11434, 78)  # a second socket
    proc.process(43, "ollama", "ollama", "serve", inodes=(78,))
    assert find_owner(ports) == PortOwner(False, "ssh listens on port 11434, which may lead to another machine")


def test_a_process_that_just_ended_is_looked_up_again(proc: FakeProc) -> None:
    proc.listen("127.0.0.1", 11434, 77)
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    (proc.folder / "42" / "comm").rename(proc.folder / "42" / "gone")
    ports = proc.ports()
    assert not find_owner(ports).is_local
    (proc.folder / "42" / "gone").rename(proc.folder / "42" / "comm")
    assert find_owner(ports).is_local


def test_accounts() -> None:
    assert port_owners._find_account(os.getuid())
    assert port_owners._find_account(3_999_999) is None


def test_several_addresses_are_looked_up_together(proc: FakeProc) -> None:
    proc.listen("127.0.0.1", 11434, 77)
    proc.listen("::", 8080, 78)
    proc.process(42, "ollama", "ollama", "serve", inodes=(77,))
    proc.process(43, "ssh", "ssh", "-L", "x", inodes=(78,))
    ports = proc.ports()
    addresses = [("127.0.0.1", 11434), ("localhost", 8080), ("127.0.0.1", 8080), ("127.0.0.1", 9)]
    elsewhere = PortOwner(False, "ssh listens on port 8080, which may lead to another machine")
    assert ports.find_owners(addresses) == dict(
        zip(
            addresses,
            [PortOwner(True), elsewhere, elsewhere, PortOwner(False, "which process listens on port 9 is not known")],
            strict=True,
        )
    )
    assert ports.find_owners(addresses[:1]) == {addresses[0]: PortOwner(True)}
