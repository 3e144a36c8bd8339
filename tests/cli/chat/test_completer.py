from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from gpumesh.cli.chat.completer import ChatCompleter
from gpumesh.cli.chat.slash_commands import COMMAND_HELP
from tests.hostile_names import NAMES


class Choices:
    command_help: Mapping[str, str] = COMMAND_HELP

    def words_after(self, command: str) -> Sequence[str]:
        return {"/model": ("qwen2.5:7b", *NAMES), "/set": ("parameter",), "/set parameter": ("top_k",)}.get(command, ())


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("/mo", ["/model"]),
        ("/s", ["/set", "/show", "/save"]),
        ("/model ", ["qwen2.5:7b"]),
        ("/model q", ["qwen2.5:7b"]),
        ("/set p", ["parameter"]),
        ("/set parameter t", ["top_k"]),
        ("/nothing x", []),
        ("hello /mo", []),
        ("hello", []),
        ("/model\n", []),
    ],
)
def test_what_is_proposed(typed: str, completed: list[str]) -> None:
    found = ChatCompleter(Choices()).get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in found] == completed
