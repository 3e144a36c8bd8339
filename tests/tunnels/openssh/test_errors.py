"""Texts of OpenSSH's client, copied word for word, and the errors that they become."""

from __future__ import annotations

import pytest

from gpumesh.tunnels.openssh.errors import NO_SESSION_PATTERN, error_from_stderr

WHERE = "[gpu.example]:2222"

REVOKED = [
    "WARNING: REVOKED HOST KEY DETECTED!",
    "The ED25519 host key for gpu.example is marked as revoked.",
    "Host key verification failed.",
]
CHANGED = [
    "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!",
    "IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!",
    "Host key for gpu.example has changed and you have requested strict checking.",
    "Host key verification failed.",
]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (REVOKED, "host-key-revoked"),
        (CHANGED, "host-key-changed"),
        (
            [
                "No ED25519 host key is known for [gpu.example]:2222 and you have requested strict checking.",
                "Host key verification failed.",
            ],
            "host-key-unknown",
        ),
        (["Error: Your SSH client doesn't support PTY"], "transport-unsupported"),
        (
            ["/home/me/.ssh/config: line 3: Bad configuration option: foo", "terminating, 1 bad"],
            "transport-unsupported",
        ),
        (['unix_listener: path "/tmp/very/long" too long for Unix domain socket'], "transport-unsupported"),
        (["ssh: Could not resolve hostname gpu.example: Name or service not known"], "host-unresolved"),
        (["ssh: Could not resolve hostname gpu: nodename nor servname provided, or not known"], "host-unresolved"),
        (["ssh: connect to host gpu.example port 2222: Connection refused"], "connect-refused"),
        (["ssh: connect to host gpu.example port 2222: Connection timed out"], "connect-timeout"),
        (["ssh: connect to host gpu.example port 2222: Operation timed out"], "connect-timeout"),
        (["Connection timed out during banner exchange", "Connection to 1.2.3.4 port 22 timed out"], "connect-timeout"),
        (["ssh: connect to host gpu.example port 2222: No route to host"], "host-unreachable"),
        (["ssh: connect to host gpu.example port 2222: Network is unreachable"], "host-unreachable"),
        (
            ["Unable to negotiate with 1.2.3.4 port 22: no matching key exchange method found. Their offer: x"],
            "transport-unsupported",
        ),
        (
            ['Load key "/home/me/.ssh/id": error in libcrypto', "me@gpu: Permission denied (publickey)."],
            "key-unreadable",
        ),
        (["no such identity: /home/me/.ssh/id: No such file or directory"], "key-unreadable"),
        (["@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @"], "key-unreadable"),
        (["me@gpu.example: Permission denied (publickey,password)."], "auth-refused"),
        (
            [
                "Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures",
                "Disconnected from 1.2.3.4",
            ],
            "auth-refused",
        ),
        (["channel 2: open failed: administratively prohibited: open failed"], "forwarding-forbidden"),
        (
            ["Exceeded MaxStartups", "kex_exchange_identification: banner line contains invalid characters"],
            "connect-refused",
        ),
        (["kex_exchange_identification: Connection closed by remote host"], "connect-refused"),
        (["kex_exchange_identification: read: Connection reset by peer"], "connect-refused"),
        (["kex_exchange_identification: banner line contains invalid characters"], "not-ssh"),
        (["Bad remote protocol version identification: 'HTTP/1.1 400'", "remote protocol version mismatch"], "not-ssh"),
        (["Timeout, server gpu.example not responding."], "tunnel-lost"),
        (["Connection to 1.2.3.4 closed by remote host."], "tunnel-lost"),
        (["client_loop: send disconnect: Broken pipe"], "tunnel-lost"),
        (["something that no ssh has ever said"], "tunnel"),
        ([], "tunnel"),
    ],
)
def test_texts_of_ssh(lines: list[str], code: str) -> None:
    error = error_from_stderr(lines, WHERE)
    assert error.code == code
    assert WHERE in error.message or code == "transport-unsupported"
    assert error.hint or code == "tunnel-lost"


def test_a_lost_connection_is_tunnel_lost_whatever_ssh_printed() -> None:
    for lines in (CHANGED, ["me@gpu: Permission denied (publickey)."], []):
        error = error_from_stderr(lines, WHERE, was_up=True)
        assert error.code == "tunnel-lost"
        assert not error.needs_person


def test_an_error_of_a_jump_host_is_recognised() -> None:
    lines = ["channel 0: open failed: connect failed: Connection refused", "stdio forwarding failed",
             "Connection closed by UNKNOWN port 65535"]  # fmt: skip
    assert error_from_stderr(lines, WHERE).code == "connect-refused"


@pytest.mark.parametrize(
    ("line", "no_session"),
    [
        ("channel 1: open failed: connect failed: open failed", True),
        ("mux_client_request_session: session request failed: Session open refused by peer", True),
        ("exec request failed on channel 2", True),
        ("bash: line 1: nvidia-smi: command not found", False),
        ("Shared connection to 1.2.3.4 closed.", False),
    ],
)
def test_texts_of_a_host_that_gives_no_session(line: str, no_session: bool) -> None:
    assert bool(NO_SESSION_PATTERN.search(line)) is no_session
