"""Jump hosts as mesh.yaml and ssh_config write them."""

from __future__ import annotations

import pytest

from gpumesh.topology import SshSpec
from gpumesh.tunnels.jump_hosts import list_hops, split_jump


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
    assert split_jump(jump, "me") == expected


@pytest.mark.parametrize("jump", ["", "root@", ":22", "root@:22", "host:port", "[::1]:port"])
def test_malformed_jump_hosts(jump: str) -> None:
    with pytest.raises(ValueError):
        split_jump(jump, "me")


def test_each_hop_is_reached_through_the_hops_before_it() -> None:
    ssh = SshSpec("gpu", 2222, "me", proxy_jump=("root@one:22", "two"))
    assert [(hop.user, hop.host, hop.port, hop.proxy_jump) for hop in list_hops(ssh)] == [
        ("root", "one", 22, ()),
        ("me", "two", 22, ("root@one:22",)),
        ("me", "gpu", 2222, ("root@one:22", "two")),
    ]
