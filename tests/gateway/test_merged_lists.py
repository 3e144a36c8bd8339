import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.gateway import merged_lists


def test_tags_are_the_union_with_the_newest_entry_of_each_name() -> None:
    a = json.dumps({"models": [{"name": "m:1", "modified_at": "2026-01-01", "size": 1}, {"name": "x"}]}).encode()
    b = json.dumps({"models": [{"name": "M:1", "modified_at": "2026-02-01", "size": 2}]}).encode()
    merged = json.loads(merged_lists.merge_tags([a, b]))
    assert [entry["name"] for entry in merged["models"]] == ["M:1", "x"]
    assert merged["models"][0]["size"] == 2


def test_a_model_that_two_nodes_have_loaded_is_listed_once() -> None:
    bodies = [
        json.dumps({"models": [{"name": "m", "expires_at": f"2026-0{month}-01"}]}).encode() for month in (1, 3, 2)
    ]
    assert json.loads(merged_lists.merge_loaded(bodies)) == {
        "models": [{"name": "m", "model": "m", "expires_at": "2026-03-01T00:00:00Z"}]
    }


def test_openai_models_are_in_the_order_of_first_mention() -> None:
    bodies = [json.dumps({"data": [{"id": "a"}, {"id": "b"}]}).encode(), json.dumps({"data": [{"id": "a"}]}).encode()]
    assert [entry["id"] for entry in json.loads(merged_lists.merge_openai_models(bodies))["data"]] == ["a", "b"]


def test_a_list_without_times_takes_no_time_from_an_entry() -> None:
    bodies = [json.dumps({"data": [{"id": "a", "": [1]}]}).encode(), json.dumps({"data": [{"id": "a"}]}).encode()]
    assert [entry["id"] for entry in json.loads(merged_lists.merge_openai_models(bodies))["data"]] == ["a"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["models", "name", "data", "id"]), inner)
    ),
    max_leaves=8,
)


@given(st.lists(st.binary(max_size=20) | json_values.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_nonsense_from_a_node_is_passed_over(bodies: list[bytes]) -> None:
    for merged in (
        merged_lists.merge_tags(bodies),
        merged_lists.merge_loaded(bodies),
        merged_lists.merge_openai_models(bodies),
    ):
        assert isinstance(json.loads(merged), dict)


@pytest.mark.usefixtures("no_garbage_collection")
def test_a_list_that_is_too_long_is_left_out() -> None:
    many = b'{"models":[' + b",".join([b'{"name":"x"}'] * 1_000_000) + b"]}"
    lists = b'{"models":[' + b",".join([b"[]"] * 4_000_000) + b"]}"
    text = b'{"models":[{"name":"' + b"x" * (30 << 20) + b'"}]}'
    began = time.thread_time()
    merged = json.loads(merged_lists.merge_tags([many, lists, text, b'{"models":[{"name":"honest"}]}']))
    assert [entry["name"] for entry in merged["models"]] == ["honest"]
    assert time.thread_time() - began < 0.5, "looked through, and not taken apart"
