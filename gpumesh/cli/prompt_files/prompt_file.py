"""The prompts of `run -f FILE`: checked as a whole before any prompt is sent, then read again one after the other."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import BinaryIO

from gpumesh.batches.prompt_lines import PromptEntry
from gpumesh.cli.prompt_input import no_prompts_error, prompt_readers
from gpumesh.cli.standard_input import open_rereadable
from gpumesh.errors import UsageError, unknown_node

MAX_WRONG_LINES = 20  # so many are listed in an error; the others are counted
_BYTE_ORDER_MARK = "\ufeff"


def prompt_digest(text: str) -> int:
    """A number of 64 bits that is another one for another prompt, as good as always."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class PromptFile:
    """A file of prompts without a wrong line. ``digests`` has the ``prompt_digest`` of each prompt by its index, for
    which 8 bytes of memory are taken. ``named_nodes`` has the nodes that prompts name, each with the index of the first
    prompt that names it."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        """Reads the whole file. ``name`` is for messages, and says whether the file has JSON lines. Raises UsageError
        with all lines that are wrong, and if there is no prompt."""
        self.name = name
        self.digests = array("Q")
        self.named_nodes: dict[str, int] = {}
        self._file = file
        self._begin = self._end = file.tell()
        errors: list[UsageError] = []
        error_count = 0
        for read in prompt_readers(self._read_lines(None), name=name):
            try:
                entry = read()
            except UsageError as error:
                error_count += 1
                if len(errors) < MAX_WRONG_LINES:
                    errors.append(error)
                continue
            if entry.node is not None:
                self.named_nodes.setdefault(entry.node, self.count)
            self.digests.append(prompt_digest(entry.text))
        if errors:
            raise _join_errors(name, errors, error_count)
        if not self.digests:
            raise no_prompts_error(name)
        self._end = file.tell()

    @property
    def count(self) -> int:
        return len(self.digests)

    def require_nodes(self, known: Collection[str]) -> None:
        """Raises UsageError if a prompt names a node that is not among ``known``, the nodes of the mesh."""
        for name, index in self.named_nodes.items():
            if name and name not in known:
                error = unknown_node(name, known)
                raise UsageError(f"{self.name}: the prompt of index {index}: {error.message}", hint=error.hint)

    def read(self, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, PromptEntry] | None]:
        """Yields the index and the prompt for each prompt that is wanted, and ``None`` for each other. Raises
        UsageError if the file was changed since it was checked, and now has a line that is wrong."""
        for index, read in enumerate(prompt_readers(self._read_lines(self._end), name=self.name)):
            if not is_wanted(index):
                yield None
                continue
            entry = read()
            if index >= self.count or prompt_digest(entry.text) != self.digests[index]:
                raise UsageError(f"{self.name} was changed while its prompts were sent")
            yield index, entry

    def _read_lines(self, end: int | None) -> Iterator[str]:
        """The lines from the begin to the position ``end``: another program may append lines meanwhile. ``None``: to
        the end of the file."""
        position = self._begin
        self._file.seek(position)
        for line in self._file:
            if end is not None and position >= end:
                return
            text = line.decode("utf-8", "replace")
            yield (text.removeprefix(_BYTE_ORDER_MARK) if position == self._begin else text).removesuffix("\n")
            position += len(line)


@contextmanager
def open_prompts(name: str) -> Iterator[PromptFile]:
    """Opens and checks a file of prompts, ``-`` for standard input. Raises UsageError as ``PromptFile`` does, and if
    the file cannot be read."""
    with open_rereadable(name) as file:
        yield PromptFile("stdin" if name == "-" else name, file)


def _join_errors(name: str, errors: list[UsageError], error_count: int) -> UsageError:
    """One error for all wrong lines of a file. ``errors``: the first of them."""
    if error_count == 1:
        return errors[0]
    lines = [f"{name} has {error_count:,} wrong lines; no prompt was sent", *(error.message for error in errors)]
    if error_count > len(errors):
        lines.append(f"… and {error_count - len(errors):,} more")
    return UsageError("\n".join(lines), hint=errors[0].hint)
