"""Generates the text and the embeddings of the simulated models: pure, deterministic, continuable from any cut.

The text up to the last blank decides the next word, as the context does for a model at temperature 0. So an answer can
be cut anywhere, even within a word, and continued on another host, as a last message of the assistant or as a raw
prompt: the other host generates exactly the missing text. The words hold letters of several alphabets and emoji: so a
test can find a proxy that cuts within a character. A token is one word with the blank before it.
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

EMBEDDING_LENGTH = 768  # numbers in one embedding, as in nomic-embed-text
ASSISTANT_MARK = "<|im_start|>assistant\n"
UNLIMITED_TOKENS = 1 << 16  # the limit of an answer without ``num_predict``: no simulated answer is as long
# A state decides the next word, and also the length of an answer or its end. For these two decisions a number is added
# to the state: so each has a random number of its own. The values themselves have no meaning.
_END_SALT = 0x9E3779B1
_LENGTH_SALT = 7


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """An answer as its tokens, in order. ``done_reason`` is ``stop``, or ``length`` if a limit has cut the answer."""

    tokens: tuple[str, ...]
    done_reason: str


def render_messages(messages: Sequence[Mapping[str, Any]], *, continues: bool = True) -> str:
    """Renders a chat as the prompt that a ChatML template makes of it.

    If ``continues``, a last message of the assistant stays open, so that the model continues this message. Any other
    prompt ends with ``ASSISTANT_MARK``, after which the model begins a new message.
    """
    parts: list[str] = []
    for number, message in enumerate(messages):
        role, content = str(message.get("role", "user")), content_text(message.get("content"))
        if message.get("tool_calls"):
            content += json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True)
        parts.append(f"<|im_start|>{role}\n{content}")
        is_last = number == len(messages) - 1
        if continues and is_last and role == "assistant":
            return "".join(parts)
        parts.append("<|im_end|>\n")
    return "".join(parts) + ASSISTANT_MARK


def content_text(content: Any) -> str:
    """The text of a message's content, which is a string, or a list of parts as in the OpenAI and Anthropic APIs.

    A part without text, such as an image, adds nothing. Any other content is an empty text.
    """
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
    """Generates the text of ``model`` after the rendered ``prompt``.

    If the prompt holds a template's mark of the assistant's turn, the text before the answer decides the length of the
    answer, in words from ``length_range``. So an answer that is continued gets the same length. Without this mark, it
    is unknown where the answer begins. Then the answer ends at a random word; its mean length is the same.

    At most ``num_predict`` tokens; ``None`` or a negative number: no limit. The answer ends before the first of the
    stop sequences ``stop`` in it.
    """
    # ``state`` is a CRC of the model, the seed and all text up to the last blank. It decides the next word.
    model_state = zlib.crc32(f"{model}\n{seed}\n".encode())
    last_word_at = max(prompt.rfind(" "), prompt.rfind("\n")) + 1
    last_word = prompt[last_word_at:]
    state = zlib.crc32(prompt[:last_word_at].encode(errors="replace"), model_state)

    answer_at: int | None = None  # where the answer begins in the prompt, if the prompt has the mark
    words_left: int | None = None
    if ASSISTANT_MARK in prompt:
        answer_at = prompt.rfind(ASSISTANT_MARK) + len(ASSISTANT_MARK)
        words_left = _draw_length(prompt[:answer_at], model_state, length_range) - count_tokens(prompt[answer_at:])
    max_tokens = num_predict if num_predict is not None and num_predict >= 0 else UNLIMITED_TOKENS
    mean_length = max(1, sum(length_range) // 2)

    tokens: list[str] = []
    separator = ""
    if last_word:  # no blank follows the last word: the answer may have been cut in this word
        word = _choose_word(state)  # the word that the model would have generated here
        belongs_to_answer = answer_at is None or last_word_at >= answer_at
        is_cut = belongs_to_answer and word.startswith(last_word) and word != last_word
        if is_cut:
            tokens.append(word.removeprefix(last_word))  # the rest of a word that ``words_left`` counts already
            state = _extend_state(state, word)
        else:
            state = _extend_state(state, last_word)
        separator = " "
    done_reason = "stop"
    while True:
        if len(tokens) >= max_tokens:
            done_reason = "length"
            break
        if _is_complete(state, words_left, mean_length):
            break
        word = _choose_word(state)
        tokens.append(separator + word)
        state = _extend_state(state, word)
        separator = " "
        if words_left is not None:
            words_left -= 1
    # ``[:max_tokens]``: with a limit of 0, the rest of a cut word is already too much.
    return cut_at_stop(GeneratedText(tuple(tokens[:max_tokens]), done_reason), stop)


def _is_complete(state: int, words_left: int | None, mean_length: int) -> bool:
    """Whether the answer ends here: after its last word, or, if its length is unknown, by a random decision."""
    if words_left is not None:
        return words_left <= 0
    return _mix(state + _END_SALT) % mean_length == 0  # once in ``mean_length`` words, on average


def cut_at_stop(answer: GeneratedText, stop: Sequence[str]) -> GeneratedText:
    """Cuts the answer before the first of the stop sequences in it. Returns the answer itself if it has none."""
    text = "".join(answer.tokens)
    positions = [text.index(sequence) for sequence in stop if sequence and sequence in text]
    if not positions:
        return answer
    tokens, characters_left = [], min(positions)
    for token in answer.tokens:
        if characters_left <= 0:
            break
        tokens.append(token[:characters_left])
        characters_left -= len(token)
    return GeneratedText(tuple(tokens), "stop")


def split_tokens(text: str, size: int = 4) -> tuple[str, ...]:
    """Cuts a fixed text (JSON, a tool call) into tokens of ``size`` characters."""
    return tuple(text[start : start + size] for start in range(0, len(text), size))


def make_schema_example(schema: Any, words: Sequence[str], depth: int = 0) -> Any:
    """Makes a value that fits a JSON schema. Only simple schemas are supported; for others, the value is a string.

    The first ``words`` are the value of each string. ``depth`` is the number of schemas around this one: a schema that
    is nested too deep also gives a string.
    """
    example_text = " ".join(words[:4])
    if not isinstance(schema, Mapping) or depth > 16:
        return example_text
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return make_schema_example(schema[key][0], words, depth + 1)
    schema_type = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(schema_type, list):  # ["string", "null"]: the value may have one of these types
        schema_type = next((name for name in schema_type if name != "null"), "null")
    match schema_type:
        case "object":
            properties = schema.get("properties") or {}
            return {name: make_schema_example(inner, words, depth + 1) for name, inner in properties.items()}
        case "array":
            count = max(1, int(schema.get("minItems", 1)))
            return [make_schema_example(schema.get("items", {}), words, depth + 1)] * count
        case "integer":  # 42, and 0.5 below: without a minimum, any number fits
            return int(schema.get("minimum", 42))
        case "number":
            return float(schema.get("minimum", 0.5))
        case "boolean":
            return True
        case "null":
            return None
    return example_text


def make_embedding(text: str, size: int = EMBEDDING_LENGTH) -> list[float]:
    """Makes an embedding of ``size`` numbers: the same text always gives the same numbers. The norm is 1."""
    state = zlib.crc32(text.encode(errors="replace"))
    values = [(_mix(state + number) / 0xFFFFFFFF) - 0.5 for number in range(size)]  # each from -0.5 to 0.5
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def _draw_length(question: str, model_state: int, length_range: tuple[int, int]) -> int:
    """Draws the length of an answer in words: always the same for the prompt up to the answer and this model."""
    shortest, longest = length_range
    state = zlib.crc32(question.encode(errors="replace"), model_state)
    return shortest + _mix(state + _LENGTH_SALT) % (longest - shortest + 1)


def _mix(state: int) -> int:
    """Makes a random 32-bit number of a CRC. A CRC is linear: without the mixing, the words would show a pattern.

    The steps and the factor are those of a known hash function for 32-bit numbers (Thomas Mueller's).
    """
    state = (state ^ (state >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    state = (state ^ (state >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return state ^ (state >> 16)


def _choose_word(state: int) -> str:
    return VOCABULARY[_mix(state) % len(VOCABULARY)]


def _extend_state(state: int, word: str) -> int:
    """The state after one more word."""
    return zlib.crc32((word + " ").encode(errors="replace"), state)
