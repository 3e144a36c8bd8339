"""Makes the input file of a batch from a file that a person submits: OpenAI's lines, JSON lines of `run -f`, or text.

The file is read once and never held: a line is in memory at a time. Each line of the input file has the number that it
has in the file of the person, so that what is wrong with a line is reported by that number. Whether a line can be sent
is decided when the batch's requests are made of its input file (``gpumesh/batches/validation.py``), not here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, BinaryIO

from gpumesh.backends.safe_json import dump_compact
from gpumesh.batches.values import MAX_LINE_BYTES, PROMPT_ENDPOINT
from gpumesh.cli.prompt_input import no_prompts_error
from gpumesh.errors import UsageError

# The endpoints that OpenAI's API has for batches, and that the mesh serves.
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_OPENAI_KEYS = {"custom_id", "method", "url", "body"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class FileKind(StrEnum):
    """What the lines of a file are. All lines of a file are of one kind."""

    OPENAI = "openai"
    PROMPTS = "prompts"  # JSON lines as `run -f` reads them
    TEXT = "text"  # each line is a prompt


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """What the command line says of all prompts. A prompt of a file keeps what it says itself; of OpenAI's lines, which
    all name a model, ``model`` takes the place of that model."""

    model: str | None = None
    node: str | None = None
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def only_for_prompts(self) -> list[str]:
        """The options of the command line that OpenAI's lines cannot take: their bodies have them."""
        given = (("--node", self.node is not None), ("--system", self.system is not None), ("-o", bool(self.options)))
        return [name for name, is_given in given if is_given]


class SubmittedFile:
    """A file that is read once. ``name`` says whether it has JSON lines. ``kind`` and ``endpoint`` are final when all
    lines were read, ``line_count`` counts those that were read so far."""

    def __init__(self, file: BinaryIO, settings: PromptSettings, *, name: str) -> None:
        self.name = name
        self.kind: FileKind | None = None
        self.line_count = 0
        self._file = file
        self._settings = settings
        self._url: str | None = None

    @property
    def endpoint(self) -> str:
        """What the requests of the batch are sent to: the first endpoint that a line names and the mesh serves."""
        return self._url or ENDPOINTS[0] if self.kind is FileKind.OPENAI else PROMPT_ENDPOINT

    def read(self) -> Iterator[bytes]:
        """Yields the lines of the input file, each with its line break. Raises UsageError if the file has blank lines
        only, and for settings that its lines cannot take; OSError if it cannot be read."""
        is_blank = True
        for line in _read_lines(self._file):
            self.line_count += 1
            content = line.removeprefix(_BYTE_ORDER_MARK if self.line_count == 1 else b"").rstrip(b"\r\n")
            if content and not content.isspace():
                is_blank = False
                content = self._make_line(content)
            yield content + b"\n"
        if is_blank:
            raise no_prompts_error(self.name)

    def _make_line(self, content: bytes) -> bytes:
        """The line of the input file. A line that is wrong stays as it is. Raises UsageError for settings that a line
        of OpenAI's cannot take."""
        if self.kind is None:
            self.kind = _recognize_kind(content, self.name)
            if self.kind is FileKind.OPENAI and self._settings.only_for_prompts:
                names = " and ".join(self._settings.only_for_prompts)
                message = f"{self.name} has lines of OpenAI's API, which say such things in their body: without {names}"
                raise UsageError(message)
        if self.kind is None or len(content) > MAX_LINE_BYTES:
            return content
        if self.kind is FileKind.TEXT:
            return self._make_prompt({"prompt": content.decode("utf-8", "replace")})
        line = _parse(content)
        if self.kind is FileKind.PROMPTS:
            prompt = {"prompt": line} if isinstance(line, str) else line
            return self._make_prompt(prompt) if isinstance(prompt, dict) else content
        if not isinstance(line, dict):
            return content
        if self._url is None and line.get("url") in ENDPOINTS:
            self._url = line["url"]
        if self._settings.model is None or not isinstance(line.get("body"), dict):
            return content
        return dump_compact({**line, "body": {**line["body"], "model": self._settings.model}})

    def _make_prompt(self, prompt: dict[str, Any]) -> bytes:
        """The line of a prompt with what the command line says and the prompt does not."""
        settings, whole = self._settings, dict(prompt)
        for key, value in (("model", settings.model), ("system", settings.system), ("node", settings.node)):
            if value is not None and whole.get(key) is None:
                whole[key] = value
        own_options = whole.get("options") or {}
        if settings.options and isinstance(own_options, dict):
            whole["options"] = {**settings.options, **own_options}
        return dump_compact(whole)


def _read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields each line, of a line that is too long only so much that it still is too long."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            pass
        yield line


def _recognize_kind(line: bytes, name: str) -> FileKind | None:
    """The kind of a file, by its first line that is not blank; ``None`` if that line is wrong and says nothing of the
    others."""
    value = _parse(line)
    if isinstance(value, dict):
        return FileKind.OPENAI if _OPENAI_KEYS & value.keys() else FileKind.PROMPTS
    if not name.endswith((".jsonl", ".ndjson")):
        return FileKind.TEXT
    return FileKind.PROMPTS if isinstance(value, str) else None


def _parse(line: bytes) -> Any:
    """The value of a JSON line; ``None`` if it is none."""
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return None
