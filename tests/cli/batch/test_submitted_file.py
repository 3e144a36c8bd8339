"""What the input file of a batch is made of: three kinds of files, the options of the command line, and long files."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest

from gpumesh.batches.values import MAX_LINE_BYTES, PROMPT_ENDPOINT
from gpumesh.cli.batch.submitted_file import FileKind, PromptSettings, SubmittedFile
from gpumesh.errors import UsageError

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"


def openai_line(**changes: Any) -> str:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m", "messages": []}}
    return json.dumps({**line, **changes})


def convert(
    *lines: str | bytes, name: str = "in.jsonl", settings: PromptSettings | None = None
) -> tuple[SubmittedFile, list[bytes]]:
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    submitted = SubmittedFile(io.BytesIO(data), settings or PromptSettings(), name=name)
    converted = list(submitted.read())
    assert all(line.endswith(b"\n") for line in converted)
    return submitted, [line.removesuffix(b"\n") for line in converted]


@pytest.mark.parametrize(
    ("name", "line", "kind", "endpoint"),
    [
        ("in.jsonl", openai_line(), FileKind.OPENAI, CHAT),
        ("-", openai_line(url=EMBEDDINGS), FileKind.OPENAI, EMBEDDINGS),
        ("in.txt", '{"method": "POST", "url": "/v1/images"}', FileKind.OPENAI, CHAT),
        ("in.txt", '{"url": {}}', FileKind.OPENAI, CHAT),
        ("in.jsonl", '{"prompt": "Why?"}', FileKind.PROMPTS, PROMPT_ENDPOINT),
        ("in.txt", '{"promt": "Why?"}', FileKind.PROMPTS, PROMPT_ENDPOINT),
        ("in.jsonl", '"Why?"', FileKind.PROMPTS, PROMPT_ENDPOINT),
        ("in.txt", '"Why?"', FileKind.TEXT, PROMPT_ENDPOINT),
        ("in.txt", "Why?", FileKind.TEXT, PROMPT_ENDPOINT),
        ("-", "{broken", FileKind.TEXT, PROMPT_ENDPOINT),
        ("in.jsonl", "{broken", None, PROMPT_ENDPOINT),
    ],
)
def test_the_kind_of_a_file(name: str, line: str, kind: FileKind | None, endpoint: str) -> None:
    submitted, _ = convert("", " ", line, name=name)
    assert (submitted.kind, submitted.endpoint, submitted.line_count) == (kind, endpoint, 3)


def test_lines_keep_their_numbers_and_wrong_lines_stay_as_they_are() -> None:
    wrong = ["{broken", "5", "[" * 100_000, '{"custom_id": "b"}']
    submitted, lines = convert("\ufeff", *wrong, openai_line(), "", name="in.jsonl")
    assert submitted.kind is FileKind.OPENAI, "a wrong first line does not decide what the others are"
    assert [line.decode() for line in lines] == ["", *wrong, openai_line(), ""]


def test_text_becomes_prompts() -> None:
    _, lines = convert("one", "", "  two \r", b"\xff", '{"a"', name="in.txt", settings=PromptSettings(model="m"))
    prompts = [json.loads(line) if line else None for line in lines]
    expected = ["one", None, "  two ", "\ufffd", '{"a"']
    assert prompts == [None if text is None else {"prompt": text, "model": "m"} for text in expected]


def test_prompts_keep_what_they_say_themselves() -> None:
    settings = PromptSettings(model="m", node="alpha", system="Be short.", options={"temperature": 0, "seed": 1})
    own = {"prompt": "two", "model": "other", "node": "beta", "system": "", "options": {"seed": 2}}
    _, lines = convert('"one"', json.dumps(own), '{"prompt": "three", "options": 5}', settings=settings)
    assert [json.loads(line) for line in lines] == [
        {"prompt": "one", "model": "m", "system": "Be short.", "node": "alpha", "options": dict(settings.options)},
        {**own, "options": {"temperature": 0, "seed": 2}},
        {"prompt": "three", "options": 5, "model": "m", "system": "Be short.", "node": "alpha"},
    ]


def test_the_model_of_lines_of_openai() -> None:
    big = 10**30
    line = openai_line(body={"model": "gpt-4o-mini", "seed": big, "user": "\ud800"})
    assert convert(line)[1] == [line.encode()]
    (made,) = convert(line, settings=PromptSettings(model="qwen2.5:7b"))[1]
    assert json.loads(made)["body"] == {"model": "qwen2.5:7b", "seed": big, "user": "\ud800"}
    with pytest.raises(UsageError, match="without --node and -o"):
        convert(line, settings=PromptSettings(node="alpha", options={"seed": 1}))


def test_a_file_of_blank_lines() -> None:
    for lines in ([], ["", " \r"]):
        with pytest.raises(UsageError, match="has no prompts"):
            convert(*lines)


def test_of_a_line_that_is_too_long_only_so_much_is_kept() -> None:
    long = b'"' + b"x" * (3 * MAX_LINE_BYTES) + b'"'
    for name in ("in.jsonl", "in.txt"):
        _, lines = convert('"one"', long, '"three"', name=name)
        assert len(lines) == 3
        assert len(lines[1]) == MAX_LINE_BYTES + 1


def test_a_long_file_is_never_held() -> None:
    count, line = 20_000, b'{"prompt": "' + b"x" * 1000 + b'"}\n'

    class Lines:
        """A file of 20 MB, made while it is read."""

        left = count

        def readline(self, _size: int) -> bytes:
            self.left -= 1
            return line if self.left >= 0 else b""

    lines: Any = Lines()
    tracemalloc.start()
    try:
        written = sum(len(made) for made in SubmittedFile(lines, PromptSettings(model="m"), name="-").read())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written > count * len(line)
    assert peak < 1 << 20
