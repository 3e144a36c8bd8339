"""The keys and values of a GGUF header. Lists of strings and long texts are skipped: only a tokenizer needs them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from gpumesh.pools.gguf.byte_reader import ByteReader
from gpumesh.pools.gguf.errors import GgufError

Number = int | float | bool
Value = Number | str | tuple[Number, ...]

STRING, ARRAY = 8, 9
NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
MAX_KEY_BYTES = 65_535  # by the format's description
MAX_KEYS = 100_000
# What we use are names and one number for each layer.
LONGEST_TEXT = 1024
LONGEST_LIST = 1024


@dataclass(frozen=True, slots=True)
class Metadata:
    """``values`` has what is short, ``lengths`` the number of members of every list, also of skipped ones."""

    values: Mapping[str, Value]
    lengths: Mapping[str, int]

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def count(self, key: str, *, most: int) -> int | None:
        """A number from 0 to ``most``; ``None`` if there is none. Raises GgufError if it is another value."""
        value = self.values.get(key)
        return None if value is None else _as_count(key, value, most)

    def counts(self, key: str, layers: int, *, most: int) -> tuple[int, ...] | None:
        """A number for each layer, which the file gives once for all or as a list."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, tuple):
            return (_as_count(key, value, most),) * layers
        if len(value) < layers:
            raise GgufError(f"{key} has {len(value)} values for {layers} layers")
        return tuple(_as_count(key, member, most) for member in value[:layers])


def read_metadata(reader: ByteReader, count: int) -> Metadata:
    """Reads ``count`` keys. Raises GgufError, EndOfData."""
    if count > MAX_KEYS:
        raise GgufError(f"it has {count} keys")
    values: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = reader.string(MAX_KEY_BYTES)
        if key is None:
            raise GgufError(f"it has a key of more than {MAX_KEY_BYTES} bytes")
        if key in seen:
            raise GgufError(f"it has the key {key[:64]!r} twice")
        seen.add(key)
        kind = reader.u32()
        if kind == ARRAY:
            kind, length = reader.u32(), reader.u64()
            lengths[key] = length
            value = _read_list(reader, key, kind, length)
        else:
            value = _read_value(reader, key, kind)
        if value is not None:
            values[key] = value
    return Metadata(values, lengths)


def _read_value(reader: ByteReader, key: str, kind: int) -> Value | None:
    if kind == STRING:
        return reader.string(LONGEST_TEXT)
    return reader.unpack(_number(key, kind))


def _read_list(reader: ByteReader, key: str, kind: int, length: int) -> Value | None:
    if kind == STRING:
        reader.skip_strings(length)
        return None
    if kind == ARRAY:
        raise GgufError(f"its key {key[:64]!r} is a list of lists")
    number = _number(key, kind)
    if length > LONGEST_LIST:
        reader.skip(number.size * length)
        return None
    return reader.unpack_many(number, length)


def _number(key: str, kind: int) -> struct.Struct:
    try:
        return NUMBERS[kind]
    except KeyError:
        raise GgufError(f"its key {key[:64]!r} has a value of the unknown type {kind}") from None


def _as_count(key: str, value: Value, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise GgufError(f"its key {key[:64]!r} is {str(value)[:64]!r}, not a number from 0 to {most}")
    return value
