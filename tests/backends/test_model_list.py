from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from gpumesh.backends import model_list
from gpumesh.text.model_names import full_name
from gpumesh.text.printable import printable
from tests.absurd_answers import ABSURD


def test_entries_by_name_the_first_of_a_name_stands() -> None:
    entries = [{"name": "m:1", "size": 1}, {"model": "n"}, {"name": "m:1", "size": 2}, {"name": "M:1"}]
    found = model_list.read_listing(entries, "name", "model")
    assert list(found.entries) == ["m:1", "n", "M:1"]
    assert found.entries["m:1"]["size"] == 1
    assert found.unusable == 0


def test_ollamas_names_are_the_same_in_any_case_and_with_or_without_a_tag() -> None:
    entries = [{"name": name} for name in ("qwen", "QWEN:latest", "host:5000/qwen", "host:5000/qwen:latest")]
    found = model_list.read_listing(entries, "name", identity=full_name)
    assert list(found.entries) == ["qwen", "host:5000/qwen"]


@pytest.mark.parametrize("name", [None, 5, "", "x" * 201, "\x1b[2J", ["m"], "\ud800"])
def test_what_has_no_name_is_left_out_and_counted(name: Any) -> None:
    found = model_list.read_listing([{"name": name}, {"name": "m"}], "name", "model")
    assert (list(found.entries), found.unusable) == (["m"], 1)


def test_a_name_that_has_to_be_cleaned_is_one_that_its_server_does_not_know() -> None:
    found = model_list.read_listing([{"name": "\x1b[31mqwen\u202e"}], "name")
    assert (list(found.entries), found.unusable) == (["qwen"], 1)


@given(ABSURD)
def test_no_list_raises(entries: Any) -> None:
    for name in model_list.read_listing(entries, "name", "model").entries:
        assert name
        assert printable(name) == name
