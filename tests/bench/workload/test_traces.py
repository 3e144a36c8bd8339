"""Both public formats, what is neither, and the traces themselves where they lie beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpumesh.bench.workload.traces import TracedRequest, parse_trace
from gpumesh.errors import UsageError

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109

2023-11-16 18:15:50.9951691,1,0
"""
MOONCAKE = [
    {"timestamp": 40, "input_length": 1300, "output_length": 3, "hash_ids": [1, 2, 3]},
    {"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [1, 9]},
]
BESIDE = Path(__file__).parents[2].parent / "shared" / "traces"


def read(text: str, **options: int) -> list[TracedRequest]:
    return parse_trace(text.splitlines(keepends=True), file="trace", **options)


def test_azures_csv() -> None:
    first, second, third = read(AZURE)
    assert first == TracedRequest(0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    assert third.output_tokens == 1, "an answer has one token at least"
    assert third.at_s == second.at_s, "Python reads six digits of a second, Azure writes seven"


def test_azures_columns_go_by_their_names() -> None:
    (only,) = read("GeneratedTokens,Model,TIMESTAMP,ContextTokens\n5,x,2023-11-16T18:15:46+01:00,7\n")
    assert only == TracedRequest(0.0, 7, 5)


def test_mooncakes_lines_in_order_of_time() -> None:
    text = "\n".join(map(json.dumps, MOONCAKE)) + "\n"
    assert read(text) == [TracedRequest(0.0, 600, 6, (1, 9)), TracedRequest(0.04, 1300, 3, (1, 2, 3))]


def test_a_line_without_blocks_and_blank_lines() -> None:
    assert read('\n\n{"timestamp": 1500.5, "input_length": 0, "output_length": 2}\n\n') == [TracedRequest(1.5005, 1, 2)]


def test_no_more_is_read_than_is_wanted() -> None:
    """The rest of a long file may be anything."""
    assert len(read(AZURE, limit=1)) == 1
    assert len(read(AZURE.replace("396", "many"), limit=1)) == 1
    with pytest.raises(UsageError, match="trace:3"):
        read(AZURE.replace("396", "many"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("a,b,c\n1,2,3\n", "trace:1: not a trace"),
        (AZURE + "yesterday,1,2\n", "trace:6"),
        (AZURE + "2023-11-16 18:15:50,1\n", "trace:6"),
        (AZURE + "2023-11-16 18:15:50,-1,5\n", "trace:6"),
        ('{"timestamp": 0, "input_length": 1}\n', "trace:1"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "trace:1"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp"\n', "trace:2"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', "trace:2"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["x"]}\n', "trace:1"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": 5}\n', "trace:1"),
        ('{"a": ' * 100_000, "trace:1"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read(text)


@pytest.mark.skipif(not BESIDE.is_dir(), reason="the public traces do not lie beside this project")
@pytest.mark.parametrize(("name", "count"), [("azure_conv_2023.csv", 19366), ("mooncake_synthetic.jsonl", 3993)])
def test_the_public_traces(name: str, count: int) -> None:
    with (BESIDE / name).open(encoding="utf-8") as lines:
        requests = parse_trace(lines, file=name)
    assert len(requests) == count
    assert [one.at_s for one in requests] == sorted(one.at_s for one in requests)
    assert requests[0].at_s == 0.0
    assert bool(requests[0].blocks) is name.endswith(".jsonl")
