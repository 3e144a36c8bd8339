from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpumesh.text.versions import oldest_version, version_key

IN_ORDER = (
    "0.1",
    "0.9.10-dev1",
    "0.9.10-rc1",
    "0.9.10-rc2",
    "0.9.10",
    "0.12.6",
    "v0.12.7",
    "0.12.10-pre",
    "0.12.10",
    "1",
    "1.0.1",
    "999999999.0",
)


def test_the_order() -> None:
    keys = [version_key(text) for text in IN_ORDER]
    assert None not in keys
    assert keys == sorted(key for key in keys if key is not None)
    assert len(set(keys)) == len(keys)
    assert version_key("0.9") == version_key("0.9.0") == version_key(" v0.9.0-lab ") == version_key("0.9.0+cuda12")


@pytest.mark.parametrize(
    "text", ["", "²", "0.²", "²-0.1", "½", "٣.٤", "1.", ".1", "1..2", "latest", "-1", "1" * 5000, "0." + "1" * 5000]
)
def test_a_text_that_is_no_version_has_no_order(text: str) -> None:
    assert version_key(text) is None
    assert oldest_version([text]) is None
    assert oldest_version([text, "0.12.6", text]) == "0.12.6"


@given(st.lists(st.text(max_size=12) | st.from_regex(r"[0-9²٣½.\-rcv]{0,12}", fullmatch=True), max_size=5))
@example(["0.²"])
def test_no_text_raises(texts: list[str]) -> None:
    found = oldest_version(texts)
    assert found is None or found in texts
    assert (found is None) == all(version_key(text) is None for text in texts)
