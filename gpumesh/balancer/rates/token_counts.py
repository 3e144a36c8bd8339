"""Compares a server's counts of tokens with the bytes that we have sent or received. Pure.

A server that counts wrongly, or that lies, could say that its answers have ten times as many tokens as they have: it
would seem to be ten times as fast, and get all requests. But a server cannot hide the text itself. How many bytes make
a token depends on the model and on the language, not on the node. So we believe a node's counts as far as they agree
with the counts of the other nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN

LEAST_BYTES_PER_TOKEN, MOST_BYTES_PER_TOKEN = 0.8, 20.0  # other figures are no samples
SMOOTHING = 0.1  # weight of the newest sample in a mean
# The bytes for each token of a single text may be above or below the usual number by this factor: code, or another
# language.
TEXT_FACTOR = 3.0
# The mean of a node may differ by this factor from what is usual, because its clients may write another language.
NODE_FACTOR = 1.25
MAX_MODELS = 200
MAX_NODES = 10_000  # with more, the node that was added first is forgotten


class TokenCounts:
    """How many bytes make one token: of prompts, or of answers.

    ``least_bytes``: a shorter text says nothing, because the template adds too much to it. ``may_hold_images``: the
    texts may hold images, and many bytes of an image make one token. So a small count may be right."""

    def __init__(self, *, least_bytes: float, may_hold_images: bool) -> None:
        self._least_bytes = least_bytes
        self._may_hold_images = may_hold_images
        self._models: dict[str, _Means] = {}  # by the model's full name

    def __repr__(self) -> str:
        usual = (f"{model} {means.usual:.1f}" for model, means in self._models.items())
        return f"<TokenCounts {', '.join(usual) or 'nothing counted'}>"

    def bytes_per_token(self, model: str) -> float:
        """The usual number for this model; a guess before the first answer."""
        means = self._models.get(model)
        return BYTES_PER_TOKEN if means is None else means.usual

    def learn(self, node: str, model: str, tokens: int | None, size: float | None) -> None:
        """Learns from a text of ``size`` bytes that had ``tokens`` tokens by the node's count. ``None``: unknown."""
        if tokens is None or tokens <= 0 or size is None or size < self._least_bytes:
            return
        sample = size / tokens
        if not LEAST_BYTES_PER_TOKEN <= sample <= MOST_BYTES_PER_TOKEN:
            return
        means = self._models.get(model)
        if means is None:
            means = self._models[model] = _Means()
            if len(self._models) > MAX_MODELS:
                del self._models[next(iter(self._models))]
        means.add(node, sample)

    def correct(self, node: str, model: str, tokens: int | None, size: float | None) -> int | None:
        """The number of tokens of a text of ``size`` bytes (``None``: not measured). ``tokens`` is the node's own count
        (``None``: it gives no count). The result is this count, corrected by the mean difference between the counts of
        this node and of the other nodes. If that number is impossible for the text, the result is our own estimate;
        ``None`` if there is no estimate."""
        means = self._models.get(model)
        usual = BYTES_PER_TOKEN if means is None else means.usual
        mean = usual if means is None else means.of_node.get(node, usual)
        if tokens is not None and not usual / NODE_FACTOR <= mean <= usual * NODE_FACTOR:
            tokens = round(tokens * mean / usual)
        if size is None or size < self._least_bytes:
            return tokens
        expected = size / usual
        if tokens is not None and expected / TEXT_FACTOR <= tokens <= expected * TEXT_FACTOR:
            return tokens
        if self._may_hold_images and (tokens is None or size > tokens * MOST_BYTES_PER_TOKEN):
            return None
        return max(round(expected), 1)


class _Means:
    """The bytes for a token of one model. ``of_node``: the geometric mean over the texts of each node. ``usual``: the
    median of these means, computed again after a quarter as many samples as there are nodes, because large fleets
    answer often."""

    def __init__(self) -> None:
        self.of_node: dict[str, float] = {}
        self.usual = BYTES_PER_TOKEN
        self._new_samples = 0

    def add(self, node: str, sample: float) -> None:
        """Adds the bytes for a token of one more text of this node."""
        mean = self.of_node.get(node, BYTES_PER_TOKEN)
        # In a geometric mean, a sample of double the mean weighs as much as a sample of half the mean.
        self.of_node[node] = mean * (sample / mean) ** SMOOTHING
        if len(self.of_node) > MAX_NODES:
            del self.of_node[next(iter(self.of_node))]
        self._new_samples += 1
        if 4 * self._new_samples >= len(self.of_node):
            self._new_samples = 0
            self.usual = _middle(self.of_node.values())


def _middle(means: Iterable[float]) -> float:
    """The median of the nodes' means. If the number of nodes is even, the usual value for English is added as one more
    mean: if two nodes differ, it decides which of them counts wrongly."""
    values = list(means)
    return median(values if len(values) % 2 else [*values, BYTES_PER_TOKEN])
