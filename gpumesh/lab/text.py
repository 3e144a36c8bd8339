"""The text of the simulated models: pure, deterministic, and continuable from any cut.

The text up to the last blank decides the next word, as the context does for a model at temperature 0. So an answer can
be cut anywhere, even within a word, and continued on another host, as a last message of the assistant or as a raw
prompt: the other host generates exactly the missing text. The words hold letters of several alphabets and emoji: a test
finds a proxy that cuts within a character. A token is one word with the blank before it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

VOCABULARY = (  # noqa: SIM905 - a list of a hundred quoted words reads worse
    "the a of and to in is that it for on with as was by at from this which be are or an not can all has one more "
    "their will each when there other about time two these may then first any like new only some could over such our "
    "after also many must before here through back years where much way well down should because long own under while "
    "last might great old world still hand place again same night house between light keeps water river stone engine "
    "signal tunnel packet window memory kernel tensor lattice, gradient, balance, morning. evening. quietly. finally. "
    "naïve café größer Öl straße été où señor año данные память сеть μέγα νύχτα 日本語 東京 模型 모델 서울 שלום "
    "🙂 🚀 👩\u200d🚀 ½ → “quoted” it's 42 3.14 100% x=1 `code` {json} <tag> C:\\temp"
).split(" ")

ASSISTANT_MARK = "<|im_start|>assistant\n"
_END_SALT = 0x9E3779B1  # so that the decision to end is not the same random number as the choice of the word


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """An answer as its tokens, in order; ``done_reason`` is ``stop`` or ``length``."""

    tokens: tuple[str, ...]
    done_reason: str


def render_messages(messages: Sequence[Mapping[str, Any]], *, continues: bool = True) -> str:
    """The prompt that a ChatML template makes. If ``continues``, a last message of the assistant stays open."""
    parts: list[str] = []
    for number, message in enumerate(messages):
        role, content = str(message.get("role", "user")), content_text(message.get("content"))
        if message.get("tool_calls"):
            content += json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True)
        parts.append(f"<|im_start|>{role}\n{content}")
        if role == "assistant" and number == len(messages) - 1 and continues:
            return "".join(parts)
        parts.append("<|im_end|>\n")
    return "".join(parts) + ASSISTANT_MARK


def content_text(content: Any) -> str:
    """The text of a message's content, which is a string, or a list of parts as in the OpenAI and Anthropic APIs."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""


def count_tokens(text: str) -> int:
    """The number of tokens: one for each word."""
    return len(text.split())


@lru_cache(maxsize=1024)
def generate_text(
    prompt: str,
    *,
    model: str,
    seed: int = 0,
    num_predict: int | None = None,
    length_range: tuple[int, int] = (48, 160),
    stop: tuple[str, ...] = (),
) -> GeneratedText:
    """The text that ``model`` generates after the rendered ``prompt``.

    If the prompt holds a template's mark of the assistant's turn, the length of the answer is drawn once from
    ``length_range``. Without this mark, the answer ends at a random word; its mean length is the same.
    """
    start = prompt.rfind(ASSISTANT_MARK) + len(ASSISTANT_MARK) if ASSISTANT_MARK in prompt else None
    low, high = length_range
    basis = zlib.crc32(f"{model}\n{seed}\n".encode())
    cut = max(prompt.rfind(" "), prompt.rfind("\n"), -1) + 1
    partial = prompt[cut:]
    state = zlib.crc32(prompt[:cut].encode(errors="replace"), basis)

    words_left: int | None = None
    if start is not None:
        opening = zlib.crc32(prompt[:start].encode(errors="replace"), basis)
        words_before = count_tokens(prompt[start:])
        words_left = low + _mix(opening + 7) % (high - low + 1) - words_before
    max_tokens = num_predict if num_predict is not None and num_predict >= 0 else 1 << 16
    mean_length = max(1, (low + high) // 2)

    tokens: list[str] = []
    space = ""
    if partial:
        word = _word(state)
        inside = (start is None or cut >= start) and word.startswith(partial)
        if inside and word != partial:  # ``words_before`` counts this word already
            tokens.append(word[len(partial) :])
            state = zlib.crc32((word + " ").encode(), state)
        else:
            state = zlib.crc32((partial + " ").encode(errors="replace"), state)
        space = " "
    reason = "stop"
    while True:
        if len(tokens) >= max_tokens:
            reason = "length"
            break
        if (words_left is not None and words_left <= 0) or (
            words_left is None and _mix(state + _END_SALT) % mean_length == 0
        ):
            break
        word = _word(state)
        tokens.append(space + word)
        state = zlib.crc32((word + " ").encode(), state)
        space = " "
        words_left = None if words_left is None else words_left - 1
    return cut_at_stop(GeneratedText(tuple(tokens[:max_tokens]), reason), stop)


def cut_at_stop(whole: GeneratedText, stop: Sequence[str]) -> GeneratedText:
    """The answer up to the first stop sequence, which is left out."""
    text = "".join(whole.tokens)
    positions = [position for sequence in stop if sequence and (position := text.find(sequence)) >= 0]
    if not positions:
        return whole
    tokens, characters_left = [], min(positions)
    for token in whole.tokens:
        if characters_left <= 0:
            break
        tokens.append(token[:characters_left])
        characters_left -= len(token)
    return GeneratedText(tuple(tokens), "stop")


def split_tokens(text: str, size: int = 4) -> tuple[str, ...]:
    """Cuts a fixed text (JSON, a tool call) into tokens of ``size`` characters."""
    return tuple(text[start : start + size] for start in range(0, len(text), size))


def make_schema_example(schema: Any, words: Sequence[str], depth: int = 0) -> Any:
    """A value that fits a JSON schema. Only simple schemas are supported. ``words`` become the texts."""
    if not isinstance(schema, Mapping) or depth > 16:
        return " ".join(words[:4])
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return make_schema_example(schema[key][0], words, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: make_schema_example(inner, words, depth + 1) for name, inner in properties.items()}
    if kind == "array":
        return [make_schema_example(schema.get("items", {}), words, depth + 1)] * max(1, int(schema.get("minItems", 1)))
    plain: dict[str, Any] = {
        "integer": int(schema.get("minimum", 42)),
        "number": float(schema.get("minimum", 0.5)),
        "boolean": True,
        "null": None,
    }
    return plain.get(str(kind), " ".join(words[:4]))


def make_embedding(text: str, size: int = 768) -> list[float]:
    """An embedding of ``size`` numbers: deterministic, with norm 1."""
    state = zlib.crc32(text.encode(errors="replace"))
    values = [(_mix(state + number) / 0xFFFFFFFF) - 0.5 for number in range(size)]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def _mix(state: int) -> int:
    """Makes a random number of a CRC. A CRC is linear: without this, the words would follow each other in a pattern."""
    state = (state ^ (state >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    state = (state ^ (state >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return state ^ (state >> 16)


def _word(state: int) -> str:
    return VOCABULARY[_mix(state) % len(VOCABULARY)]
