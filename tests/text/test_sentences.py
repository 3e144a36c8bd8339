from __future__ import annotations

import pytest

from gpumesh.text.sentences import join_all, join_some


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_all_names(names: list[str], text: str) -> None:
    assert join_all(names) == text


@pytest.mark.parametrize(("limit", "text"), [(4, "a, b, c"), (3, "a, b, c"), (2, "a, b and 1 more")])
def test_some_names(limit: int, text: str) -> None:
    assert join_some(["a", "b", "c"], limit) == text
