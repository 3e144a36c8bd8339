"""Reads a line of an input file: is it a request, what is sent, and which prompts share its beginning. Pure."""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated

import msgspec

from gpumesh.batches.prompt_lines import read_prompt_line
from gpumesh.batches.values import MAX_LINE_BYTES, PROMPT_ENDPOINT
from gpumesh.errors import UsageError

# Prompts are put in order by the hashes of so many bytes of their beginnings. A shorter prompt counts as a whole.
PREFIX_SIZES = (256, 1024, 4096, 16384)
MIN_GROUP_BYTES = PREFIX_SIZES[0]  # prompts with a shorter common beginning gain nothing by going to the same node
_HASH_BYTES = 6
_LOCATION = "line"  # stands before the messages of ``read_prompt_line``
MAX_CUSTOM_ID_CHARS = 512


class LineProblem(Exception):
    """A line is no request. ``code`` is a short word for programs, the text a sentence for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestLine(msgspec.Struct, frozen=True):
    """A line that is a request. ``body``: what is sent to the endpoint; for ``PROMPT_ENDPOINT`` the line itself.
    ``custom_id``: the name that the file gives it; empty if it gives none."""

    custom_id: str
    body: bytes


class _OpenAiLine(msgspec.Struct, frozen=True):
    """A line as OpenAI's API has it."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)]
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Prompt(msgspec.Struct, frozen=True):
    """The model of a body, and the members that the server renders into the prompt, in the order of the prompt."""

    model: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    functions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


_decode_line = msgspec.json.Decoder(_OpenAiLine).decode
_decode_prompt = msgspec.json.Decoder(_Prompt).decode


def read_request_line(endpoint: str, content: bytes) -> RequestLine:
    """The request of a line. Raises LineProblem."""
    if len(content) > MAX_LINE_BYTES:
        raise LineProblem("line_too_long", f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
    if endpoint == PROMPT_ENDPOINT:
        return _read_prompt(content)
    try:
        line = _decode_line(content)
    except msgspec.ValidationError as error:
        raise LineProblem("invalid_request", f"not a request of a batch: {error}") from error
    except (ValueError, RecursionError) as error:
        raise LineProblem("invalid_json_line", f"not JSON: {error}") from error
    if line.method != "POST":
        raise LineProblem("invalid_method", f"the method is POST, not {line.method[:20]!r}")
    if line.url != endpoint:
        raise LineProblem("mismatched_url", f"the batch is for {endpoint}, and the line for {line.url[:200]!r}")
    body = bytes(line.body)
    if not body.startswith(b"{"):
        raise LineProblem("invalid_request", "the body is no JSON object")
    return RequestLine(line.custom_id, body)


def _read_prompt(content: bytes) -> RequestLine:
    """The prompt of a line. Raises LineProblem."""
    try:
        text = content.decode()
        msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise LineProblem("invalid_json_line", f"not JSON: {error}") from error
    try:
        read_prompt_line(text, _LOCATION)
    except UsageError as error:
        raise LineProblem("invalid_prompt", error.message.removeprefix(f"{_LOCATION}: ")) from error
    return RequestLine("", content)


def find_order(body: bytes) -> tuple[bytes, str]:
    """``NewRequest.order`` and ``NewRequest.group`` of a request with this body: by its model, then by the beginning of
    its prompt. Both hold hashes, no text. The group is empty for a short prompt, and for a body that cannot be read."""
    try:
        prompt = _decode_prompt(body)
    except (ValueError, RecursionError):  # a text instead of an object, for example
        return b"", ""
    model = bytes(prompt.model)
    members = (prompt.system, prompt.instructions, prompt.tools, prompt.functions, prompt.messages, prompt.prompt)
    text = b"".join(bytes(member)[: PREFIX_SIZES[-1]] for member in (*members, prompt.input))
    hashes = [_hash(model), *(_hash(text[:size]) for size in PREFIX_SIZES)]
    group = _hash(model + b"\0" + text[:MIN_GROUP_BYTES]).hex() if len(text) >= MIN_GROUP_BYTES else ""
    return b"".join(hashes), group


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_HASH_BYTES).digest()
