"""How much memory the values of a graph of operations need together, as ggml lays them out (ggml/src/ggml-alloc.c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 128  # of CUDA's buffers; the CPU's have 32


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation with its result of ``bytes`` (0: it writes elsewhere). ``sources`` are the numbers of the operations
    whose results it reads. ``in_place``: it may write its result over one of them that nothing else reads."""

    bytes: int
    sources: tuple[int, ...] = ()
    in_place: bool = False


def graph_bytes(operations: Sequence[Operation]) -> int:
    """The size of the buffer in which all results find a place, one operation after the other."""
    readers = [0] * len(operations)
    for operation in operations:
        for source in operation.sources:
            readers[source] += 1
    memory = _Memory()
    places: dict[int, _Block] = {}
    for number, operation in enumerate(operations):
        size = -(-operation.bytes // ALIGNMENT) * ALIGNMENT
        reused = _reusable(operation, size, readers, places) if operation.in_place else None
        if reused is not None:
            places[number] = places.pop(reused)
        elif size:
            places[number] = memory.take(size)
        for source in operation.sources:
            readers[source] -= 1
            if not readers[source] and source in places:
                memory.give_back(places.pop(source))
    return memory.most


@dataclass(slots=True)
class _Block:
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


def _reusable(operation: Operation, size: int, readers: list[int], places: dict[int, _Block]) -> int | None:
    for source in operation.sources:
        if source in places and readers[source] == 1 and places[source].size == size:
            return source
    return None


class _Memory:
    """Free blocks in the order of their addresses; the last one has no end."""

    def __init__(self) -> None:
        self._free = [_Block(0, 2**62)]
        self.most = 0

    def take(self, size: int) -> _Block:
        """The smallest block that is large enough; the last one only if no other is."""
        best: int | None = None
        for index, block in enumerate(self._free[:-1]):
            if block.size >= size and (best is None or block.size <= self._free[best].size):
                best = index
        block = self._free[len(self._free) - 1 if best is None else best]
        taken = _Block(block.offset, size)
        block.offset += size
        block.size -= size
        if not block.size:
            self._free.remove(block)
        self.most = max(self.most, taken.end)
        return taken

    def give_back(self, freed: _Block) -> None:
        index = sum(block.offset < freed.offset for block in self._free)
        before = self._free[index - 1] if index else None
        after = self._free[index]
        if before is not None and before.end == freed.offset:
            before.size += freed.size
            freed = before
        else:
            self._free.insert(index, freed)
        if freed.end == after.offset:
            freed.size += after.size
            self._free.remove(after)
