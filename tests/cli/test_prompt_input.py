from __future__ import annotations

import pytest

from gpumesh.backends.base import Message
from gpumesh.batches.prompt_lines import PromptEntry
from gpumesh.cli.prompt_input import read_options, read_prompts
from gpumesh.daemon.sessions.prompt_requests import make_request
from gpumesh.daemon.sessions.session import PromptRequest
from gpumesh.errors import UsageError


def texts(text: str, name: str = "p.txt") -> list[str]:
    return [prompt.text for prompt in read_prompts(text, name=name)]


def test_each_line_is_a_prompt_but_blank_lines() -> None:
    assert texts("one\n\n  two \r\nthree") == ["one", "  two ", "three"]
    assert texts("[1, 2]\n5\n") == ["[1, 2]", "5"], "only an object makes it JSON lines"
    assert texts('{not json}\n"x"\n') == ["{not json}", '"x"']


def test_json_lines_are_recognized_by_name_or_first_line() -> None:
    assert texts('{"prompt": "one"}\n"two"\n') == ["one", "two"]
    assert texts('"one"\n"two"\n', "p.jsonl") == ["one", "two"]
    assert texts('"one"\n', "p.ndjson") == ["one"]
    assert texts('"one"\n') == ['"one"']


def test_keys_of_a_json_prompt() -> None:
    (prompt,) = read_prompts(
        '{"prompt": "p", "model": "m", "system": "s", "node": "n", "options": {"seed": 1}}', name="x"
    )
    ask = make_request(
        prompt, PromptRequest((), model="other", node="other", options={"seed": 2, "top_k": 3}), "not this"
    )
    assert ask.messages == (Message("system", "s"), Message("user", "p"))
    assert (ask.model, ask.node, dict(ask.options)) == ("m", "n", {"seed": 1, "top_k": 3})


def test_missing_keys_come_from_the_command_line() -> None:
    ask = make_request(PromptEntry("p"), PromptRequest((), model="m", node="n", options={"seed": 2}), "s")
    assert ask.messages == (Message("system", "s"), Message("user", "p"))
    assert (ask.model, ask.node, dict(ask.options)) == ("m", "n", {"seed": 2})
    assert make_request(PromptEntry("p"), PromptRequest(()), None).messages == (Message("user", "p"),)


def test_messages_with_images() -> None:
    (prompt,) = read_prompts(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "images": ["QUJD"]}]}',
        name="x",
    )
    assert prompt.text == "b"
    assert prompt.messages == (Message("user", "a"), Message("user", "b", ("QUJD",)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n \n", "p.jsonl has no prompts"),
        ('{"prompt": "a"}\n{', "p.jsonl:2:2: not JSON: Expecting property name enclosed in double quotes"),
        ('{"prompt": "a"}\nplain', "p.jsonl:2:1: not JSON: Expecting value"),
        ("5", "p.jsonl:1: expected an object with a key `prompt`, or a string"),
        ('{"promt": "a"}', "p.jsonl:1: unknown key 'promt'"),
        ('{"prompt": 5}', "p.jsonl:1: prompt is not a string"),
        ('{"prompt": "a", "model": []}', "p.jsonl:1: model is not a string"),
        ('{"prompt": "a", "options": [1]}', "p.jsonl:1: options is not an object"),
        ('{"model": "m"}', "p.jsonl:1: needs either prompt or messages"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "needs either prompt or messages"),
        ('{"messages": []}', "messages is not a list"),
        ('{"messages": [5]}', "a message is an object with role and content"),
        ('{"messages": [{"role": "user"}]}', "a message is an object with role and content"),
        ('{"messages": [{"role": "user", "content": "a", "x": 1}]}', "a message is an object"),
        ('{"messages": [{"role": "user", "content": 5}]}', "role, content and images of a message are strings"),
        ('{"messages": [{"role": "user", "content": "a", "images": [5]}]}', "images of a message are strings"),
        ('{"messages": [{"role": "user", "content": "a", "images": "QUJD"}]}', "images is not a list"),
        ("[" * 100_000, "p.jsonl:1: not JSON: nested too deeply"),
        ('{"prompt": %s}' % ("1" * 5000), "p.jsonl:1: a number is too long"),
    ],
)
def test_each_problem_names_its_line(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_prompts(text, name="p.jsonl")


def test_option_values_are_json_or_text() -> None:
    pairs = ["temperature=0.2", "stop=[\"###\"]", "num_predict = 5", "format=json", "empty=", "a=b=c"]  # fmt: skip
    assert read_options(pairs) == {
        "temperature": 0.2,
        "stop": ["###"],
        "num_predict": 5,
        "format": "json",
        "empty": "",
        "a": "b=c",
    }


@pytest.mark.parametrize("pair", ["temperature", "=5", " =5", ""])
def test_an_option_without_a_value_is_an_error(pair: str) -> None:
    with pytest.raises(UsageError, match="is not key=value"):
        read_options([pair])
