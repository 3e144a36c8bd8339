"""A file of results: what a run leaves when it is killed at any moment, and how another run goes on with it."""

from __future__ import annotations

import contextlib
import json
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh.cli.prompt_files.prompt_file import PromptFile, open_prompts
from gpumesh.cli.prompt_files.result_file import ResultFile
from gpumesh.errors import GPUMeshError, UsageError

PROMPT_COUNT = 20


@pytest.fixture
def prompts(tmp_path: Path) -> Iterator[PromptFile]:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {index} ü\n" for index in range(PROMPT_COUNT)))
    with open_prompts(str(file)) as opened:
        yield opened


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def result_line(index: int, *, error: str | None = None, response: str | None = "yes", prompt: str = "") -> str:
    prompt = prompt or f"prompt {index} ü"
    result = {"index": index, "prompt": prompt, "response": None if error else response, "node": "a", "error": error}
    return json.dumps(result, ensure_ascii=False)


def write_lines(out: Path, *lines: str) -> None:
    out.write_text("".join(f"{line}\n" for line in lines))


def go_on(out: Path, prompts: PromptFile, *, most: int = PROMPT_COUNT) -> list[int]:
    """Goes on with the file, and writes ``most`` results. Returns the indexes that were missing."""
    with contextlib.closing(ResultFile(str(out), prompts, resume=True)) as results:
        results.begin()
        missing = [index for index in range(prompts.count) if results.is_missing(index)]
        for index in missing[:most]:
            results.write(index, result_line(index).encode())
        if most >= len(missing):
            results.finish()
    return missing


def indexes(out: Path) -> list[int]:
    return [json.loads(line)["index"] for line in out.read_text().splitlines()]


def test_any_beginning_of_a_file_is_gone_on_with(prompts: PromptFile, out: Path) -> None:
    """Whichever byte is the last that was written, each prompt has exactly one result in the end."""
    whole = "".join(f"{result_line(index)}\n" for index in range(PROMPT_COUNT)).encode()
    for size in range(0, len(whole) + 1, 7):
        out.write_bytes(whole[:size])
        missing = go_on(out, prompts)
        assert len(missing) == PROMPT_COUNT - whole[:size].count(b"\n")
        assert out.read_bytes() == whole
    out.write_bytes(whole[:100] + bytes(50))  # a loss of power
    go_on(out, prompts)
    assert out.read_bytes() == whole


def test_results_with_an_error_are_tried_again_and_all_stand_in_order(prompts: PromptFile, out: Path) -> None:
    failed = {3, 4, 11, 19}
    write_lines(out, *(result_line(index, error="gone" if index in failed else None) for index in range(PROMPT_COUNT)))
    out.chmod(0o640)
    assert go_on(out, prompts) == sorted(failed)
    assert indexes(out) == list(range(PROMPT_COUNT))
    assert '"gone"' not in out.read_text()
    assert out.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_runs_that_are_killed_again_and_again_lose_and_double_nothing(prompts: PromptFile, out: Path) -> None:
    chance = random.Random(5)
    for _ in range(8):
        out.unlink(missing_ok=True)
        while True:
            missing = go_on(out, prompts, most=chance.randrange(8))
            written = indexes(out)
            assert len(set(written)) == len(written)
            if not missing:
                break
            lines = out.read_text().splitlines()
            for number in range(len(lines)):
                if chance.random() < 0.1:
                    lines[number] = result_line(written[number], error="the node is gone")
            write_lines(out, *lines)
            with out.open("a") as file:
                file.write(result_line(0)[: chance.randrange(30)])
        assert written == list(range(PROMPT_COUNT))


def test_a_result_that_is_there_twice_is_kept_once(prompts: PromptFile, out: Path) -> None:
    write_lines(out, result_line(1), result_line(0), result_line(1, response="another"), result_line(2, error="gone"))
    go_on(out, prompts)
    assert indexes(out) == list(range(PROMPT_COUNT))
    assert "another" not in out.read_text()


def test_until_it_begins_nothing_is_changed(prompts: PromptFile, out: Path) -> None:
    """The mesh could not be opened, for example."""
    text = f"{result_line(0, error='gone')}\n{result_line(1)}\n{result_line(2)[:20]}"
    out.write_text(text)
    with contextlib.closing(ResultFile(str(out), prompts, resume=True)) as results:
        assert (results.done_count, results.failed_count) == (1, 1)
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{result_line(0)}\n{result_line(1, prompt='other')}\n", ":2: the prompt of index 1 is another one in "),
        (f"{result_line(99)}\n", ":1: has index 99, but .* has 20 prompts"),
        ('{"prompt": "x"}\n', ":1: not a result of"),
        ('{"index": true, "prompt": "x", "response": "", "error": null}\n', ":1: not a result of"),
        ('{"index": 0, "prompt": 5, "response": "", "error": null}\n', ":1: not a result of"),
        (f"{result_line(0)}\n\n", ":2: not a result of"),
        ("[" * 100_000 + "\n", ":1: not a result of"),
        ("my diary, without a line break", ":1: not a result of"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(
    prompts: PromptFile, out: Path, text: str, said: str
) -> None:
    out.write_text(text)
    with pytest.raises(UsageError, match=said):
        ResultFile(str(out), prompts, resume=True)
    with pytest.raises(UsageError, match="exists already"):
        ResultFile(str(out), prompts, resume=False)
    assert out.read_text() == text


def test_what_cannot_be_a_file_of_results(prompts: PromptFile, tmp_path: Path) -> None:
    for name, said in (("/dev/null", "is no regular file"), (str(tmp_path), "cannot write"), ("/no/file", "cannot")):
        with pytest.raises(UsageError, match=said):
            ResultFile(name, prompts, resume=True)


def test_two_runs_do_not_write_to_one_file(prompts: PromptFile, out: Path) -> None:
    write_lines(out, result_line(0, error="gone"), result_line(1))
    with contextlib.closing(ResultFile(str(out), prompts, resume=True)) as results:
        with pytest.raises(GPUMeshError, match="another `gpumesh run` writes to"):
            ResultFile(str(out), prompts, resume=True)
        results.begin()  # replaces the file by another one
        with pytest.raises(GPUMeshError, match="another `gpumesh run` writes to"):
            ResultFile(str(out), prompts, resume=True)
    go_on(out, prompts)
    assert indexes(out) == list(range(PROMPT_COUNT))


def test_a_link_stays_a_link(prompts: PromptFile, out: Path, tmp_path: Path) -> None:
    write_lines(out, result_line(1), result_line(0))
    link = tmp_path / "link"
    link.symlink_to(out)
    go_on(link, prompts)
    assert link.is_symlink()
    assert indexes(out) == list(range(PROMPT_COUNT))


def test_a_full_disk_leaves_whole_lines(prompts: PromptFile, out: Path) -> None:
    """Here the system lets the file grow to 1000 bytes only. As with a full disk, the last line fits in part."""
    with contextlib.closing(ResultFile(str(out), prompts, resume=False)) as results:
        results.begin()
        with file_size_limit(1000), pytest.raises(OSError, match="too large") as raised:
            write_all(results)
    assert raised.value.filename == str(out)
    assert out.read_bytes().endswith(b"}\n")
    written = indexes(out)
    assert 5 < len(written) < PROMPT_COUNT
    assert go_on(out, prompts) == list(range(len(written), PROMPT_COUNT))


def write_all(results: ResultFile) -> None:
    for index in range(PROMPT_COUNT):
        results.write(index, result_line(index).encode())


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
