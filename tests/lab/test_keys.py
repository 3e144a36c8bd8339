import pytest

from gpumesh.lab import keys
from gpumesh.lab.keys import parse_public_key


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_new_key_can_be_read_back_and_is_no_other(kind: str) -> None:
    private = keys.new_key(kind)
    assert keys.public_key_line(private) != keys.public_key_line(keys.new_key(kind))
    assert parse_public_key(keys.public_key_line(private)).asbytes() == keys.parse_private_key(private).asbytes()
    assert (
        parse_public_key(keys.public_key_line(private) + " a comment").asbytes()
        == keys.parse_private_key(private).asbytes()
    )


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="no such kind"):
        keys.new_key("dsa")


@pytest.mark.parametrize("line", ["", "ssh-ed25519", "ssh-ed25519 ???", "ssh-strange AAAA"])
def test_what_is_no_public_key_is_said(line: str) -> None:
    with pytest.raises(ValueError, match="not a public key"):
        parse_public_key(line)


def test_known_hosts_names_the_port_unless_it_is_22() -> None:
    private = keys.new_key()
    assert keys.known_hosts_line(private, 2200).startswith("[127.0.0.1]:2200 ssh-ed25519 ")
    assert keys.known_hosts_line(private, 22).startswith("127.0.0.1 ssh-ed25519 ")
