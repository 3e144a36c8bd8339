"""``PrefixIndex``: the prompts and sessions that the fleet's servers are believed to have in their caches. Pure.

For each node and residency key the index holds the last prompts that were sent there, as many as the server's cache is
believed to hold (``cache_size.py``). A prompt that continues an earlier one takes its place, as it does on the server.
Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice

from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN, LEAST_BYTES, SEQUENCES_PER_SLOT, CacheSize
from gpumesh.balancer.prefixes.prints import PromptPrint
from gpumesh.balancer.prefixes.tree import PrefixTree, Run

MAX_BLOCKS = 1 << 19  # of all nodes together, about 50 MB; with more, the prompt that was used longest ago is forgotten
MAX_KEYS = 64  # residency keys of one node: a client may ask for any ``num_ctx``
MAX_SESSIONS = 256  # of one node and key
MAX_ALL_SESSIONS = 1 << 16  # of all nodes together
MAX_AGE_S = 3600.0  # a prompt whose last use is longer ago is not believed to be in a cache
MAX_EXPIRED = 4  # prompts that are forgotten for their age in one call, to bound its time


class _Sequence:
    """A prompt that a node holds, and the node's cache that holds it. ``run`` is its last run in the tree of the key
    (``tree.py``), ``size`` its length in bytes, ``used_at`` the time when it was last sent."""

    __slots__ = ("cache", "run", "size", "used_at")

    def __init__(self, cache: _NodeCache, run: Run) -> None:
        self.cache = cache
        self.run = run
        self.size = 0
        self.used_at = 0.0


class _NodeCache:
    """What one node holds for one residency key. ``sequences`` (by their last run) and ``sessions`` (for each session
    the size of its last prompt in bytes) are ordered by their last use, the oldest first. ``size`` is how much the
    server's cache is believed to hold, ``total_bytes`` the size of all sequences."""

    __slots__ = ("key", "node", "sequences", "sessions", "size", "total_bytes")

    def __init__(self, node: str, key: Hashable, size: CacheSize) -> None:
        self.node = node
        self.key = key
        self.size = size
        self.sequences: dict[Run, _Sequence] = {}
        self.sessions: dict[int, int] = {}
        self.total_bytes = 0

    @property
    def is_too_full(self) -> bool:
        """Whether the oldest sequence must go. A single sequence always stays, because its length in tokens is not
        known (an image has many bytes and few tokens)."""
        count = len(self.sequences)
        return count > self.size.sequences or (count > 1 and self.total_bytes > self.size.max_bytes)


class PrefixIndex:
    """The index of the whole fleet. A ``key`` is a residency key (``base.ResidencyKey``). ``sequences_per_slot`` and
    ``least_bytes`` are for the first estimate of every cache's size (``CacheSize``)."""

    def __init__(self, *, sequences_per_slot: int = SEQUENCES_PER_SLOT, least_bytes: int = LEAST_BYTES) -> None:
        self._per_slot = sequences_per_slot
        self._least_bytes = least_bytes
        self._trees: dict[Hashable, PrefixTree] = {}  # by key
        self._caches: dict[str, dict[Hashable, _NodeCache]] = {}  # by the name of the node, then by key
        self._sequences: dict[_Sequence, None] = {}
        """The sequences of all nodes, ordered by their last use, the oldest first. (The dict is an ordered set.)"""
        self._session_nodes: dict[tuple[Hashable, int], dict[str, None]] = {}
        """For each key and session, the nodes that had its requests (an ordered set). Both the sessions and the nodes
        of each are ordered by their last use, the oldest first."""
        self._block_count = 0  # of all trees together

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self._caches)} nodes, {len(self._sequences)} prompts, {self._block_count} blocks>"

    # -- prompts -------------------------------------------------------------------------------------------------

    def match(self, key: Hashable, prompt: PromptPrint, session: int | None = None) -> dict[str, int]:
        """How many bytes of the prompt each node is believed to have in its cache, from the prompt's beginning on.
        Nodes that have none are left out.

        If no node has the first block, the session that the client names counts instead (``match_session``)."""
        tree = self._trees.get(key)
        held = {} if tree is None else tree.find_holders(prompt.blocks)
        return self.match_session(key, session, prompt.size) if session is not None and not held else held

    def match_session(self, key: Hashable, session: int, prompt_bytes: int) -> dict[str, int]:
        """How many bytes of a prompt each node is believed to have in its cache if this is the next prompt of the
        session: as many as the session's last prompt there had, and at most ``prompt_bytes``. Nodes that have not had
        the session lately are left out."""
        held: dict[str, int] = {}
        for node in self._session_nodes.get((key, session), ()):
            cache = self._caches[node][key]
            # The server has no more sessions in its cache than sequences: those that were used last.
            if session in islice(reversed(cache.sessions), cache.size.sequences):
                held[node] = min(cache.sessions[session], prompt_bytes)
        return held

    def displaced_bytes(self, node: str, key: Hashable) -> int:
        """The size of the prompt that the node's server would forget for a new prompt, which continues no prompt in its
        cache; 0 if there is room for one more."""
        caches = self._caches.get(node)
        cache = None if caches is None else caches.get(key)
        if cache is None or len(cache.sequences) < cache.size.sequences:
            return 0
        oldest = next(iter(cache.sequences.values()), None)
        return 0 if oldest is None else oldest.size

    def add(self, node: str, key: Hashable, prompt: PromptPrint, now: float) -> None:
        """Notes that the prompt was sent to the node, so that its server will have it."""
        cache = self._use_cache(node, key)
        tree = self._trees.get(key)
        if tree is None:
            tree = self._trees[key] = PrefixTree()
        old_count = len(tree)
        sequence, continued = self._insert_prompt(cache, tree, prompt.blocks)
        self._block_count += len(tree) - old_count
        cache.total_bytes += prompt.size - sequence.size
        sequence.size = prompt.size
        sequence.used_at = now
        # The sequence moves to the end of both orders: it was used last.
        cache.sequences.pop(sequence.run, None)
        cache.sequences[sequence.run] = sequence
        self._sequences.pop(sequence, None)
        self._sequences[sequence] = None
        if continued is not None:
            self._drop(continued)
        self._drop_surplus(cache)
        self._drop_oldest(now)

    def _insert_prompt(
        self, cache: _NodeCache, tree: PrefixTree, blocks: tuple[int, ...]
    ) -> tuple[_Sequence, _Sequence | None]:
        """Puts the blocks of a prompt into the tree. Returns the sequence for it, and the sequence that the prompt
        continues and that must be dropped, if there is one."""
        run, depth = tree.find(blocks)
        own_run = run  # after the loop: the last of the prompt's runs that this node holds
        while own_run is not None and cache.node not in own_run.holders:
            own_run = own_run.parent
        # The prompt continues a sequence if that ends with this run, and the prompt has all blocks of the run.
        continued = None
        if own_run is not None and own_run.end <= depth:
            continued = cache.sequences.get(own_run)
        if continued is None or own_run is None:
            return _Sequence(cache, tree.insert(cache.node, blocks, run, depth)), None
        if own_run.end == len(blocks):  # the same prompt as before
            return continued, None
        # If only this one sequence goes through its last run, this run can grow, and the sequence stays the same.
        if own_run.children == 0 and len(own_run.holders) == 1 and own_run.holders[cache.node] == 1:
            tree.extend(own_run, blocks)
            return continued, None
        return _Sequence(cache, tree.insert(cache.node, blocks, run, depth)), continued

    def _drop_surplus(self, cache: _NodeCache) -> None:
        """Forgets the oldest sequences of one cache until it is not larger than its estimated size."""
        while cache.is_too_full:
            self._drop(next(iter(cache.sequences.values())))

    def _drop_oldest(self, now: float) -> None:
        """Forgets the oldest sequences of all nodes: those above the limit, and some of those that are too old."""
        while self._block_count > MAX_BLOCKS:
            self._drop(next(iter(self._sequences)))
        for _ in range(MAX_EXPIRED):
            oldest = next(iter(self._sequences), None)
            if oldest is None or now - oldest.used_at <= MAX_AGE_S:
                return
            self._drop(oldest)

    def _drop(self, sequence: _Sequence) -> None:
        """Forgets a sequence, and the blocks that only this sequence has."""
        cache = sequence.cache
        del cache.sequences[sequence.run]
        cache.total_bytes -= sequence.size
        del self._sequences[sequence]
        tree = self._trees[cache.key]
        old_count = len(tree)
        tree.remove(cache.node, sequence.run)
        self._block_count += len(tree) - old_count
        if not len(tree):
            del self._trees[cache.key]

    # -- the caches of the servers -------------------------------------------------------------------------------

    def _use_cache(self, node: str, key: Hashable) -> _NodeCache:
        """The cache of the node for this key. Makes a new cache if there is none, and forgets the cache that was used
        longest ago if there are too many."""
        caches = self._caches.get(node)
        if caches is None:
            caches = self._caches[node] = {}
        cache = caches.pop(key, None)
        if cache is None:
            cache = _NodeCache(node, key, CacheSize(self._per_slot, self._least_bytes))
            if len(caches) >= MAX_KEYS:
                self._empty(caches.pop(next(iter(caches))))
        caches[key] = cache
        return cache

    def set_capacity(
        self,
        node: str,
        key: Hashable,
        *,
        slots: int | None,
        context_tokens: int | None,
        bytes_per_token: float = BYTES_PER_TOKEN,
    ) -> None:
        """Sets the size of the server's cache from what the server says (``CacheSize.set_server_size``): its ``slots``,
        and the most tokens of one sequence. ``None``: the server does not report the number. May be called again with
        the same figures: what was learned from answers stays."""
        cache = self._use_cache(node, key)
        cache.size.set_server_size(slots, context_tokens, bytes_per_token)
        self._drop_surplus(cache)

    def learn(
        self,
        node: str,
        key: Hashable,
        *,
        prompt_bytes: int,
        believed_bytes: int,
        prompt_tokens: float,
        read_tokens: float,
    ) -> None:
        """Learns from one answer how many sequences the server keeps (``CacheSize.learn``). ``believed_bytes`` is what
        ``match`` gave for the node when the prompt was sent."""
        cache = self._caches.get(node, {}).get(key)
        if cache is not None:
            cache.size.learn(
                prompt_bytes=prompt_bytes,
                believed_bytes=believed_bytes,
                prompt_tokens=prompt_tokens,
                read_tokens=read_tokens,
                held_sequences=len(cache.sequences),
            )
            self._drop_surplus(cache)

    def keys_of(self, node: str) -> list[Hashable]:
        """The keys for which the node is known to have a cache, at most ``MAX_KEYS``."""
        return list(self._caches.get(node, ()))

    def forget(self, node: str, key: Hashable | None = None) -> None:
        """Forgets the prompts that the node holds for this key, because the model was unloaded. Without a key: forgets
        all about the node, because its server was restarted or the node is gone."""
        caches = self._caches.get(node)
        if caches is None:
            return
        if key is None:
            for cache in caches.values():
                self._empty(cache)
            del self._caches[node]
        elif key in caches:
            self._empty(caches[key])  # its size stays: the server is the same

    def _empty(self, cache: _NodeCache) -> None:
        """Forgets the sequences and the sessions of a cache."""
        for sequence in list(cache.sequences.values()):
            self._drop(sequence)
        for session in list(cache.sessions):
            self._drop_session(cache, session)

    # -- sessions ------------------------------------------------------------------------------------------------

    def note_session(self, node: str, key: Hashable, session: int, prompt_bytes: int) -> None:
        """Notes that a request of this session was sent to the node. ``session`` is a hash of the session's name."""
        cache = self._use_cache(node, key)
        cache.sessions.pop(session, None)
        cache.sessions[session] = prompt_bytes
        nodes = self._session_nodes.pop((key, session), {})
        nodes.pop(node, None)
        nodes[node] = None
        self._session_nodes[key, session] = nodes
        if len(cache.sessions) > MAX_SESSIONS:
            self._drop_session(cache, next(iter(cache.sessions)))
        if len(self._session_nodes) > MAX_ALL_SESSIONS:
            old_key, old_session = next(iter(self._session_nodes))
            for old_node in list(self._session_nodes[old_key, old_session]):
                self._drop_session(self._caches[old_node][old_key], old_session)

    def _drop_session(self, cache: _NodeCache, session: int) -> None:
        """Forgets that this node has had the session."""
        del cache.sessions[session]
        nodes = self._session_nodes[cache.key, session]
        del nodes[cache.node]
        if not nodes:
            del self._session_nodes[cache.key, session]
