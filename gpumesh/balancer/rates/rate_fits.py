"""Fits the rates of one model on one node to its answers. Pure.

Streams that run together share the GPU, so a rate that was measured among other streams is no property of the node. The
time for one token of each of ``k`` streams is taken to be linear in ``k``::

    t(k) = t1 * (1 + a * (k - 1))

``t1`` is the time of a lone stream, ``a`` the share that each neighbour takes. Both are fitted by least squares, where
an old answer weighs less than a new one. Until a node's answers have shown ``a``, it is taken to be as on the other
nodes, and ``DEFAULT_SHARE`` if none has shown it.

A server's figures may be lies. So each answer moves what is known by a bounded factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

DEFAULT_SHARE = 0.2  # llama.cpp with four slots gives a little over twice the tokens/s of one slot
# Rates outside these bounds are not kept: no hardware reaches them, and they would make all forecasts meaningless.
MIN_TOKEN_S, MAX_TOKEN_S = 1e-5, 60.0  # seconds for one token of an answer
MIN_READ_S, MAX_READ_S = 1e-7, 10.0  # seconds for one token of a prompt
MAX_SHARE = 2.0

MEMORY = 0.98  # the weight of all older answers relative to a new one: about the last 50 answers count
OUTLIER_MEMORY = 0.6  # the same, from the second outlier in a row on the same side: then the node has changed
OUTLIER_FACTOR = 1.5  # a figure that is more than this factor above or below the expected figure is an outlier
# A new figure that is more than this factor above or below the expected figure counts as a figure at this bound. So one
# answer changes a known time by at most this factor, and the share by at most SHARE_STEP.
MAX_STEP = 2.0
SHARE_STEP = 0.25
MAX_FIRST_STEP = 16.0  # instead of MAX_STEP, for the first long prompt after short ones
PRIOR_WEIGHT = 0.1  # ``prior_share`` weighs as much as a tenth of an answer with one neighbour

RECENT_WEIGHT = 0.4  # of a new figure in the recent mean
PAST_WEIGHT = 0.02  # of a new figure in the mean of the node's past
# A figure counts as at most this multiple of the past mean: one bad answer does not make a node slow.
MAX_RECENT_STEP = 3.0
SLOW_FACTOR = 2.0  # a node is slow if its recent mean is more than this multiple of its past mean
MIN_SAMPLES_SLOW = 8  # with fewer answers a node is not called slow

RESTORED_ANSWERS = 8  # stored rates count as this number of answers …
RESTORED_NEIGHBOURS = 2.0  # … every second of them with this number of neighbours …
RESTORED_PROMPT = 256.0  # … and with this number of tokens in each prompt


@dataclass(slots=True)
class DecodeRate:
    """The decoding of one model: ``token_s`` is t1 and ``share`` is a. ``prior_share`` is a without any answers.

    The sums are those of the least squares over the answers: ``weight``, and the weighted sums of x = k - 1, x², y =
    seconds for one token, and x*y. ``recent_s`` and ``past_s`` are means of the time for one token of a lone stream.
    ``samples`` counts the answers. ``outliers`` counts the outliers in a row; negative if they were too fast."""

    token_s: float
    share: float = DEFAULT_SHARE
    prior_share: float = DEFAULT_SHARE
    weight: float = 0.0
    sum_x: float = 0.0
    sum_xx: float = 0.0
    sum_y: float = 0.0
    sum_xy: float = 0.0
    recent_s: float = 0.0
    past_s: float = 0.0
    samples: int = 0
    outliers: int = 0

    @classmethod
    def restore(cls, token_s: float, share: float) -> Self:
        """A rate as after ``RESTORED_ANSWERS`` answers that were exactly as these values say."""
        rate = cls(token_s, share)
        for _ in range(RESTORED_ANSWERS // 2):
            for neighbours in (0.0, RESTORED_NEIGHBOURS):
                rate.learn(token_s * (1.0 + share * neighbours), neighbours, 1.0)
        rate.token_s, rate.share = token_s, share  # without the small pull of the prior
        return rate

    @property
    def measured_share(self) -> float | None:
        """``share``, if answers with neighbours weigh more in it than ``prior_share``; else ``None``."""
        return self.share if self.sum_xx > PRIOR_WEIGHT else None

    def learn(self, token_s: float, neighbours: float, weight: float) -> None:
        """Learns from the mean time for one token of an answer that had ``neighbours`` other streams beside it."""
        slowdown = 1.0 + self.share * neighbours
        self._compare_with_past(token_s / slowdown)
        expected = self.token_s * slowdown
        bounded = min(max(token_s, expected / MAX_STEP), expected * MAX_STEP)
        self.outliers = _count_outliers(self.outliers, token_s / expected)
        memory = _choose_memory(self.outliers)
        # An error counts relative to the expected time. Otherwise the answers among many streams would outweigh all.
        weight /= slowdown * slowdown
        self.weight = self.weight * memory + weight
        self.sum_x = self.sum_x * memory + weight * neighbours
        self.sum_xx = self.sum_xx * memory + weight * neighbours * neighbours
        self.sum_y = self.sum_y * memory + weight * bounded
        self.sum_xy = self.sum_xy * memory + weight * neighbours * bounded
        self._fit()

    def _fit(self) -> None:
        """Computes ``share`` and ``token_s`` from the sums, in bounded steps.

        This minimises sum(w * (y - t1 - b*x)²) + PRIOR_WEIGHT * (b - prior_share * t1)², where b = t1 * a: two linear
        equations for t1 and b."""
        first = self.weight + PRIOR_WEIGHT * self.prior_share**2
        mixed = self.sum_x - PRIOR_WEIGHT * self.prior_share
        second = self.sum_xx + PRIOR_WEIGHT
        # Cramer's rule. The determinant is left out: it is positive, and divides both, so the share does not need it.
        token_s = self.sum_y * second - self.sum_xy * mixed
        slope = self.sum_xy * first - self.sum_y * mixed
        share = slope / token_s if token_s > 0.0 else MAX_SHARE
        share = min(max(share, self.share - SHARE_STEP, 0.0), self.share + SHARE_STEP, MAX_SHARE)
        # The best t1 for this share, which was bounded.
        slowed = self.weight + 2.0 * share * self.sum_x + share * share * self.sum_xx
        token_s = (self.sum_y + share * self.sum_xy) / slowed
        token_s = min(max(token_s, self.token_s / MAX_STEP), self.token_s * MAX_STEP)
        self.share = share
        self.token_s = min(max(token_s, MIN_TOKEN_S), MAX_TOKEN_S)

    def _compare_with_past(self, lone_s: float) -> None:
        """Adds the time for one token of a lone stream to the recent mean and to the mean of the past."""
        self.samples += 1
        if self.samples == 1:
            self.recent_s = self.past_s = lone_s
            return
        bounded = min(lone_s, self.past_s * MAX_RECENT_STEP)
        self.recent_s += RECENT_WEIGHT * (bounded - self.recent_s)
        # The mean of the first answers is the past to which the later answers are added slowly.
        past_weight = 1.0 / self.samples if self.samples <= MIN_SAMPLES_SLOW else PAST_WEIGHT
        self.past_s += past_weight * (bounded - self.past_s)

    def is_slow_now(self) -> bool:
        """Whether the recent rate is under half of the rate of the past."""
        return self.samples >= MIN_SAMPLES_SLOW and self.recent_s > SLOW_FACTOR * self.past_s


@dataclass(slots=True)
class PrefillRate:
    """How fast a node reads the prompts of one model: ``token_s`` are the seconds for one token of a prompt.

    It is the quotient of two weighted sums over the answers, ``seconds`` and ``tokens``. ``outliers`` is as in
    ``DecodeRate``. A long prompt counts more than a short one, because in a short one the fixed cost of a request hides
    the rate."""

    token_s: float
    seconds: float = 0.0
    tokens: float = 0.0
    outliers: int = 0

    @classmethod
    def restore(cls, token_s: float) -> Self:
        """A rate as after ``RESTORED_ANSWERS`` prompts of ``RESTORED_PROMPT`` tokens that were read at exactly this
        rate."""
        rate = cls(token_s)
        rate.learn(token_s, RESTORED_ANSWERS * RESTORED_PROMPT)
        return rate

    def learn(self, token_s: float, weight_tokens: float) -> None:
        """Learns from the mean time for one token of a prompt, which counts like a prompt of ``weight_tokens``
        tokens."""
        # A prompt that is longer than all earlier prompts together says more than these did.
        step = MAX_STEP if weight_tokens <= self.tokens else MAX_FIRST_STEP
        bounded = min(max(token_s, self.token_s / step), self.token_s * step)
        self.outliers = _count_outliers(self.outliers, token_s / self.token_s)
        memory = _choose_memory(self.outliers)
        self.seconds = self.seconds * memory + weight_tokens * bounded
        self.tokens = self.tokens * memory + weight_tokens
        self.token_s = min(max(self.seconds / self.tokens, MIN_READ_S), MAX_READ_S)


def _count_outliers(outliers: int, ratio: float) -> int:
    """The number of outliers in a row on the same side: positive if they were too large, negative if they were too
    small, 0 if the last figure was no outlier. ``outliers`` is this number before the last figure, ``ratio`` the last
    figure divided by what was expected."""
    if ratio > OUTLIER_FACTOR:
        return max(outliers, 0) + 1
    if ratio < 1.0 / OUTLIER_FACTOR:
        return min(outliers, 0) - 1
    return 0


def _choose_memory(outliers: int) -> float:
    """The factor for the weight of all older answers. It is smaller after two outliers in a row on the same side, which
    show that the node has changed."""
    return MEMORY if abs(outliers) < 2 else OUTLIER_MEMORY
