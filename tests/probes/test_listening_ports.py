"""Which ports of a host are asked for a server: by the kernel's own tables, and never because a host says so."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.probes.listening_ports import COMMAND, MAX_PORTS, choose_ports, read_ports
from tests.probes.shell_host import ShellHost

REST = "00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0"


def line(address: str, port: int, state: str = "0A") -> bytes:
    remote = "0" * len(address)
    return f"   0: {address}:{port:04X} {remote}:0000 {state} {REST}\n".encode()


@pytest.mark.parametrize(
    ("output", "ports"),
    [
        (line("0100007F", 11434) + line("00000000", 8000), {11434, 8000}),
        (line("7F000001", 11434), {11434}),  # a host with the other byte order
        (line("0" * 32, 8080) + line("0000000000000000FFFF00000100007F", 80), {8080, 80}),
        (line("0A01A8C0", 9000), set()),  # on another address alone
        (line("0100007F", 11434, "01"), set()),  # a connection
        (b"grep: /proc/net/tcp6: No such file or directory\n" + line("0100007F", 1), {1}),
        (b"Welcome to 0A\n\n:::: 0100007F:ZZZZ 0 0A\n0: 0100007F:12345 0 0A\n0: 0100007F:-1F4 0 0A", set()),
        (line("0100007F", 0), set()),
    ],
)
def test_the_kernels_lines_are_read(output: bytes, ports: set[int]) -> None:
    assert read_ports(output) == ports


async def test_a_real_hosts_ports_are_found(host: ShellHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = await host.exec(COMMAND, timeout_s=20.0)
        assert listener.getsockname()[1] in read_ports(result.stdout)


def test_usual_ports_come_first_and_other_services_are_left_alone() -> None:
    assert choose_ports({22, 5432, 9999, 8000, 11434, 40000}, (11434, 80, 8000)) == (11434, 8000, 9999)
    assert choose_ports({40000}, (40000,)) == (40000,), "a person has named it"
    assert len(choose_ports(range(1000, 30000), ())) == MAX_PORTS


@given(st.binary(max_size=300))
def test_no_output_raises(output: bytes) -> None:
    assert all(0 < port < 65536 for port in read_ports(output))
