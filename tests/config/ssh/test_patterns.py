"""OpenSSH's pattern lists."""

from __future__ import annotations

import pytest

from gpumesh.config.ssh.patterns import matches_pattern_list


@pytest.mark.parametrize(
    ("name", "patterns", "matches"),
    [
        ("a", ["a"], True),
        ("ab", ["a"], False),
        ("ab", ["a*"], True),
        ("ab", ["a?"], True),
        ("ab", ["*", "!ab"], False),
        ("ab", ["!ab", "*"], False),
        ("a[b", ["a[b"], True),
        ("ab", [], False),
        ("[ab]:22", ["[ab]:*"], True),
        ("AB", ["ab"], False),
    ],
)
def test_pattern_lists(name: str, patterns: list[str], matches: bool) -> None:
    assert matches_pattern_list(name, patterns) is matches
