"""Host names and addresses as text."""

from __future__ import annotations

import pytest

from gpumesh.text.addresses import format_address, is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("localhost.example", False),
        ("192.168.1.2", False),
        ("0.0.0.0", False),
        ("gpu", False),
        ("", False),
    ],
)
def test_loopback_is_decided_by_the_text(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert format_address("gpu", 22) == "gpu:22"
    assert format_address("::1", 22) == "[::1]:22"
