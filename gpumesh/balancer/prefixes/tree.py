"""``PrefixTree``: the blocks that the nodes are believed to have, for one residency key. Pure.

A sequence is a prompt that a node holds. Sequences with the same beginning share its blocks, so all sequences together
are a tree. Blocks without a branch between them are one ``Run``. Every sequence ends at the end of a run: a run is
split where a sequence ends or branches off. So all nodes that hold one block of a run hold the whole run, and all runs
above it.
"""

from __future__ import annotations

from bisect import bisect_left

from gpumesh.balancer.prefixes.prints import BLOCK_ENDS


class Run:
    """Consecutive blocks of prompts, between which no prompt ends or branches off.

    - ``blocks``: their hashes. ``end``: how many blocks a prompt has up to the end of this run.
    - ``holders``: for each node that holds the run, how many of its sequences go through it.
    - ``parent``: the run before it; ``None`` at the beginning of prompts. ``children``: the number of runs after it.
    """

    __slots__ = ("blocks", "children", "end", "holders", "parent")

    def __init__(self, blocks: tuple[int, ...], end: int, holders: dict[str, int], parent: Run | None) -> None:
        self.blocks = blocks
        self.end = end
        self.holders = holders
        self.parent = parent
        self.children = 0

    def __repr__(self) -> str:
        return f"<Run {len(self.blocks)} blocks up to {self.end}, {len(self.holders)} nodes>"


class PrefixTree:
    """All runs of one residency key."""

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        self._runs: dict[int, Run] = {}
        """The run of each block."""

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._runs)

    def __repr__(self) -> str:
        return f"<PrefixTree {len(self)} blocks>"

    def find(self, blocks: tuple[int, ...]) -> tuple[Run | None, int]:
        """Returns the run of the last known block of a prompt, and the number of known blocks. The last known block may
        be in the middle of the run. ``None`` and 0 if no block is known.

        If a block is known, all blocks before it are known too. So a binary search finds the last known block: in the
        reversed prompt, first come the unknown blocks (False), then the known blocks (True)."""
        runs = self._runs
        if blocks[0] not in runs:
            return None, 0
        reversed_blocks = blocks[::-1]
        depth = len(blocks) - bisect_left(reversed_blocks, True, key=runs.__contains__)
        return runs[blocks[depth - 1]], depth

    def find_holders(self, blocks: tuple[int, ...]) -> dict[str, int]:
        """How many bytes of a prompt each node holds, from its beginning on. Nodes that hold none are left out."""
        run, depth = self.find(blocks)
        held: dict[str, int] = {}
        while run is not None:
            # A node that holds a run also holds its parent. So if the numbers are equal, this run adds no node.
            if len(run.holders) != len(held):
                more = dict.fromkeys(run.holders, BLOCK_ENDS[depth - 1])
                more.update(held)  # the nodes of the runs below hold more
                held = more
            run = run.parent
            if run is not None:
                depth = run.end
        return held

    def insert(self, node: str, blocks: tuple[int, ...], run: Run | None, depth: int) -> Run:
        """Adds a sequence of ``node``, and returns its last run. ``run`` and ``depth``: from ``find(blocks)``."""
        if run is not None and depth < run.end:
            run = self._split(run, depth)
        if depth < len(blocks):
            if run is not None:
                run.children += 1
            run = Run(blocks[depth:], len(blocks), {}, run)
            self._register(run.blocks, run)
        assert run is not None, "``blocks`` is empty"
        above: Run | None = run
        while above is not None:
            above.holders[node] = above.holders.get(node, 0) + 1
            above = above.parent
        return run

    def extend(self, run: Run, blocks: tuple[int, ...]) -> None:
        """Lengthens the sequence that ends with ``run`` to these ``blocks``, which begin with the blocks of that
        sequence. No other sequence may go through ``run``."""
        assert run.children == 0, "other runs come after this run"
        new_blocks = blocks[run.end :]
        run.blocks += new_blocks
        run.end = len(blocks)
        self._register(new_blocks, run)

    def remove(self, node: str, run: Run) -> None:
        """Removes the sequence of ``node`` whose last run is ``run``, and the blocks that no other sequence has."""
        above: Run | None = run
        while above is not None:
            parent = above.parent
            count = above.holders[node] - 1
            if count > 0:
                above.holders[node] = count
            else:
                del above.holders[node]
                if not above.holders:
                    self._remove_run(above)
            above = parent

    def _register(self, blocks: tuple[int, ...], run: Run) -> None:
        """Notes that these blocks belong to ``run``."""
        runs = self._runs
        for block in blocks:  # this takes half of the time of ``update`` with ``dict.fromkeys``
            runs[block] = run

    def _remove_run(self, run: Run) -> None:
        """Removes a run that no node holds any more."""
        runs = self._runs
        for block in run.blocks:
            del runs[block]
        if run.parent is not None:
            run.parent.children -= 1

    def _split(self, run: Run, depth: int) -> Run:
        """Splits off the part of the run up to ``depth`` blocks from the prompt's beginning, and returns this part.
        Afterwards ``run`` is only the part after ``depth``, and is still the last run of the sequences that end with
        it."""
        length = len(run.blocks) - (run.end - depth)
        head = Run(run.blocks[:length], depth, dict(run.holders), run.parent)
        head.children = 1
        run.blocks = run.blocks[length:]
        run.parent = head
        self._register(head.blocks, head)
        return head
