"""Little-endian numbers and strings, read from the first bytes of a file."""

from __future__ import annotations

import struct

from gpumesh.pools.gguf.errors import GgufError

# The largest headers of real models have some 20 MB, nearly all of it the tokenizer.
MAX_HEADER_BYTES = 64 * 2**20
# The tokenizers of real models have up to 600,000 strings in one list.
MAX_STRINGS = 2_000_000


class EndOfData(Exception):
    """The header goes on behind the bytes at hand, to byte ``needed`` of the file at least."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"the header has at least {needed} bytes")
        self.needed = needed


class ByteReader:
    """Reads ``data`` from its start on. Every method raises EndOfData when the data ends too early, and GgufError when
    the header would be longer than MAX_HEADER_BYTES."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def need(self, count: int) -> None:
        """Raises unless ``count`` more bytes are at hand."""
        end = self.position + count
        if end > MAX_HEADER_BYTES:
            raise GgufError(f"its header would be longer than {MAX_HEADER_BYTES // 2**20} MiB")
        if end > len(self._data):
            raise EndOfData(end)

    def skip(self, count: int) -> None:
        self.need(count)
        self.position += count

    def take(self, count: int) -> bytes:
        self.need(count)
        start = self.position
        self.position = start + count
        return self._data[start : self.position]

    def unpack(self, form: struct.Struct) -> int | float | bool:
        """One number."""
        self.need(form.size)
        (value,) = form.unpack_from(self._data, self.position)
        self.position += form.size
        return value  # type: ignore[no-any-return]

    def unpack_many(self, form: struct.Struct, count: int) -> tuple[int | float | bool, ...]:
        return tuple(value for (value,) in form.iter_unpack(self.take(form.size * count)))

    def u32(self) -> int:
        return int(self.unpack(U32))

    def u64(self) -> int:
        return int(self.unpack(U64))

    def string(self, longest: int) -> str | None:
        """A string; ``None`` if it has more than ``longest`` bytes (it is skipped then)."""
        length = self.u64()
        if length > longest:
            self.skip(length)
            return None
        return self.take(length).decode(errors="replace")

    def skip_strings(self, count: int) -> None:
        """Skips a list of strings: the only part of a header that must be walked through."""
        if count > MAX_STRINGS:
            raise GgufError(f"it has a list of {count} strings")
        self.need(count * U64.size)
        data, position, end = self._data, self.position, len(self._data) - U64.size
        length_at = U64.unpack_from
        for left in range(count, 0, -1):
            if position > end:
                self.position = position
                self.need(left * U64.size)
            position += U64.size + length_at(data, position)[0]
        self.position = position
        self.need(0)


U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
