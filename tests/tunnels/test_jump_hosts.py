"""Jump hosts as mesh.yaml and ssh_config write them."""

from __future__ import annotations

import pytest

from gpumesh.tunnels.jump_hosts import parse_jump


@pytest.mark.parametrize(
    ("jump", "expected"),
    [
        ("bastion", ("me", "bastion", 22)),
        ("root@bastion", ("root", "bastion", 22)),
        ("root@bastion:2222", ("root", "bastion", 2222)),
        ("bastion:2222", ("me", "bastion", 2222)),
        ("a@b@bastion", ("a@b", "bastion", 22)),  # a user name may hold one
        ("[::1]:2222", ("me", "::1", 2222)),
        ("root@[::1]", ("root", "::1", 22)),
        ("::1", ("me", "::1", 22)),
        ("root@fe80::1%eth0", ("root", "fe80::1%eth0", 22)),
    ],
)
def test_jump_hosts(jump: str, expected: tuple[str, str, int]) -> None:
    assert parse_jump(jump, "me") == expected


@pytest.mark.parametrize("jump", ["", "root@", ":22", "root@:22", "host:port", "[::1]:port"])
def test_malformed_jump_hosts(jump: str) -> None:
    with pytest.raises(ValueError):
        parse_jump(jump, "me")
