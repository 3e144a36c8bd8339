"""``ChatCompleter``: completes the commands of a chat and their words, from what is known already: it asks nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from gpumesh.cli.completion import safe_names


class ChatChoices(Protocol):
    """What the completer proposes. ``words_after`` has the words that may follow a command such as ``/set`` or
    ``/set parameter``; names of hosts among them are hostile until they are filtered here."""

    @property
    def command_help(self) -> Mapping[str, str]: ...

    def words_after(self, command: str) -> Sequence[str]: ...


class ChatCompleter(Completer):
    """Completes a line that begins with ``/``. Only plain names are proposed (``safe_names``)."""

    def __init__(self, choices: ChatChoices) -> None:
        self._choices = choices
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completes the name of a slash command, then its words: a path for /save and /load, or one of the command's
        own words."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, blank, _ = text.rpartition(" ")
        if not blank:
            for name, help_line in self._choices.command_help.items():
                if name.startswith(text):
                    yield Completion(name, -len(text), display_meta=help_line)
            return
        if command in ("/save", "/load"):
            path = text[len(command) + 1 :]
            yield from self._paths.get_completions(Document(path), complete_event)
            return
        incomplete = text[len(command) + 1 :]
        for word in safe_names(self._choices.words_after(command.strip()), incomplete):
            yield Completion(word, -len(incomplete))
