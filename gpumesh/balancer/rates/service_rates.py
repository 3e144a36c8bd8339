"""Learns how fast a node serves each model: decoding, reading prompts, loading. Pure.

Decoding rates are learned cleaned of concurrency (``rate_fits.py``). Figures that no hardware gives are ignored.
Everything else moves what is known of this node by a bounded factor, and of no other node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from gpumesh.balancer.rates.rate_fits import (
    DEFAULT_SHARE,
    MAX_READ_S,
    MAX_SHARE,
    MAX_STEP,
    MAX_TOKEN_S,
    MIN_READ_S,
    MIN_TOKEN_S,
    DecodeRate,
    PrefillRate,
)

# Used where nothing was measured yet. These are about the figures of a 7B model in 4 bits on an RTX 4090.
DEFAULT_TOKEN_S = 1 / 60  # seconds for one token of a lone stream
DEFAULT_LOAD_S = 6.0  # to load a model into GPU memory
PREFILL_SPEEDUP = 20.0  # prompt tokens are read about twenty times as fast as new tokens are generated

# Figures outside these bounds are ignored.
MIN_LOAD_S, MAX_LOAD_S = 0.2, 3600.0  # a shorter load_duration is no load: a model in memory reports some ms too
MAX_TOKENS = 1 << 27
MAX_STREAMS = 4096.0

MIN_DECODED_TOKENS = 4  # an answer with fewer tokens is too short to measure the time for one
FULL_WEIGHT_TOKENS = 32  # an answer with fewer tokens counts less
MIN_READ_TOKENS = 16  # below it the fixed cost of a request hides the rate
FULL_WEIGHT_READ = 2048.0  # a prompt with fewer tokens counts less
LOAD_WEIGHT = 0.5  # of a new load time
SHARE_WEIGHT = 0.2  # of one node's share that a neighbour takes, in the usual one of all nodes
CLOCK_WEIGHT = 0.3  # of an answer that only our own clock has measured: the network is in its figures
WAIT_WEIGHT = 0.3  # of a time longer than expected that may contain a wait for other requests

MAX_MODELS = 256  # of one node; with more, the model that was learned first is forgotten
MAX_NAME_CHARS = 400  # of a model whose rates are stored
FORMAT = 1  # of ``as_dict``


class _StoredDecode(msgspec.Struct, forbid_unknown_fields=True):
    """The decoding of one model as it is stored."""

    token_s: Annotated[float, msgspec.Meta(ge=MIN_TOKEN_S, le=MAX_TOKEN_S)]
    share: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_SHARE)]


_Value = TypeVar("_Value")
_ModelName = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]


class _StoredRates(msgspec.Struct, forbid_unknown_fields=True):
    """The document of ``as_dict``, by model."""

    format: Annotated[int, msgspec.Meta(ge=FORMAT, le=FORMAT)]
    decode: dict[_ModelName, _StoredDecode]
    prefill: dict[_ModelName, Annotated[float, msgspec.Meta(ge=MIN_READ_S, le=MAX_READ_S)]]
    load: dict[_ModelName, Annotated[float, msgspec.Meta(ge=MIN_LOAD_S, le=MAX_LOAD_S)]]


class MeasuredRates(NamedTuple):
    """The rates of one model on one node, as measured there; ``None``: not measured. ``token_s`` are the seconds for a
    token of a lone stream. Each other stream at the same time makes a token take ``share * token_s`` longer.
    ``read_token_s`` are the seconds to read a token of a prompt, ``load_s`` those of a load."""

    token_s: float | None
    share: float | None
    read_token_s: float | None
    load_s: float | None


class Pace(msgspec.Struct, frozen=True, gc=False):
    """How fast a node works with one model, as far as anything is known. ``token_s``, ``share`` and ``read_token_s``
    are as in ``MeasuredRates``. ``fallback_answers``: if a part of these rates was not measured on this node, but comes
    from ``fallback``, the number of answers from which ``fallback`` had learned; ``None``: all were measured here."""

    token_s: float
    share: float
    read_token_s: float
    fallback_answers: int | None


class ServiceRates:
    """How fast one node serves each model, by the model's full name.

    A question about a model that was not measured on this node is answered from ``fallback``, which has learned from
    the same model on other nodes; else from the last other model on this node; else from any model on other nodes; else
    by a constant.
    """

    def __init__(self, fallback: ServiceRates | None = None) -> None:
        self._fallback = fallback
        self._decode: dict[str, DecodeRate] = {}  # of the models that were measured on this node
        self._prefill: dict[str, PrefillRate] = {}  # the same models
        self._load: dict[str, float] = {}  # seconds
        self._usual_shares: dict[str, float] = {}  # of a fleet: the mean of what its nodes have learned
        self._last_decode: DecodeRate | None = None  # that of the model that was measured last
        self._last_prefill: PrefillRate | None = None
        self._last_load: float | None = None
        self._answers = 0  # how many were learned from
        self._paces: dict[str, Pace] = {}  # the cache of ``pace``; emptied by each answer of this node

    def __repr__(self) -> str:
        models = (f"{model} {1 / rate.token_s:.0f} tokens/s" for model, rate in self._decode.items())
        return f"<ServiceRates {', '.join(models) or 'nothing measured'}>"

    # -- questions -----------------------------------------------------------------------------------------------

    def pace(self, model: str) -> Pace:
        """The rates for this model that a forecast needs for each request, from a cache."""
        fallback_answers = 0 if self._fallback is None else self._fallback._answers
        pace = self._paces.get(model)
        # A pace in the cache is up to date if it does not depend on ``fallback``, or if that has learned nothing since.
        if pace is not None and (pace.fallback_answers is None or pace.fallback_answers == fallback_answers):
            return pace
        fallback = self._fallback
        if model not in self._decode and model not in self._prefill and fallback is not None:
            pace = fallback.pace(model)
            if pace.fallback_answers is None:  # the fleet has measured all: nothing of it is better known here
                return pace
        decode = self._decode.get(model) or self._find_decode(model)
        token_s, share = (DEFAULT_TOKEN_S, DEFAULT_SHARE) if decode is None else (decode.token_s, decode.share)
        is_own = model in self._decode and model in self._prefill
        pace = Pace(token_s, share, self.prefill_s(model, 1.0), None if is_own else fallback_answers)
        if len(self._paces) >= MAX_MODELS:
            self._paces.clear()
        self._paces[model] = pace
        return pace

    def decode_s(self, model: str, tokens: float, streams: float = 1.0) -> float:
        """The seconds to generate this number of tokens while ``streams`` streams run together, this one included."""
        rate = self._decode.get(model) or self._find_decode(model)
        if rate is None:
            return tokens * DEFAULT_TOKEN_S * (1.0 + DEFAULT_SHARE * (streams - 1.0))
        return tokens * rate.token_s * (1.0 + rate.share * (streams - 1.0))

    def share(self, model: str) -> float:
        """The share that each neighbour takes of a stream: 0.2 makes it take 1.2 times as long."""
        rate = self._decode.get(model) or self._find_decode(model)
        return DEFAULT_SHARE if rate is None else rate.share

    def prefill_s(self, model: str, tokens: float) -> float:
        """The seconds to read this number of tokens of a prompt, which are not in the server's cache."""
        rate = self._prefill.get(model) or self._find_prefill(model)
        if rate is None:
            return self.decode_s(model, tokens) / PREFILL_SPEEDUP
        return tokens * rate.token_s

    def load_s(self, model: str) -> float:
        """Seconds to load the model into memory."""
        return self._load.get(model) or self._find_load(model) or DEFAULT_LOAD_S

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured on this node."""
        return not (self._decode or self._prefill or self._load)

    def measured(self) -> dict[str, MeasuredRates]:
        """What was measured on this node, by the model's full name (units: ``MeasuredRates``)."""
        rates: dict[str, MeasuredRates] = {}
        for model in {**self._decode, **self._prefill, **self._load}:
            decode, prefill = self._decode.get(model), self._prefill.get(model)
            rates[model] = MeasuredRates(
                token_s=None if decode is None else decode.token_s,
                share=None if decode is None else decode.measured_share,
                read_token_s=None if prefill is None else prefill.token_s,
                load_s=self._load.get(model),
            )
        return rates

    def is_measured(self, model: str) -> bool:
        """Whether this node has generated with this model."""
        return model in self._decode

    def measured_prefill(self, model: str) -> float | None:
        """How many tokens of a prompt this node reads in a second; ``None`` if that was not measured here."""
        rate = self._prefill.get(model)
        return None if rate is None else 1.0 / rate.token_s

    def is_slow_now(self, model: str) -> bool:
        """Whether the node generates with this model at under half the rate of its own past."""
        rate = self._decode.get(model)
        return rate is not None and rate.is_slow_now()

    # Each of the next three methods finds what is known best of a model that was not measured on this node, in the
    # order that the class's docstring says; ``None`` if nothing was measured anywhere.

    def _find_decode(self, model: str) -> DecodeRate | None:
        fallback = self._fallback
        if fallback is None:
            return self._last_decode
        return fallback._decode.get(model) or self._last_decode or fallback._last_decode

    def _find_prefill(self, model: str) -> PrefillRate | None:
        fallback = self._fallback
        if fallback is None:
            return self._last_prefill
        return fallback._prefill.get(model) or self._last_prefill or fallback._last_prefill

    def _find_load(self, model: str) -> float | None:
        fallback = self._fallback
        if fallback is None:
            return self._last_load
        return fallback._load.get(model) or self._last_load or fallback._last_load

    # -- learning ------------------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        """Counts an answer, and empties the cache of ``pace``."""
        self._answers += 1
        self._paces.clear()

    def learn(
        self,
        model: str,
        *,
        tokens: int | None = None,
        eval_s: float | None = None,
        mean_streams: float = 1.0,
        unread_tokens: int | None = None,
        prompt_s: float | None = None,
        mean_prefills: float = 1.0,
        load_s: float | None = None,
    ) -> None:
        """Learns from the server's own figures for one answer; ``None`` for a figure that it did not give.

        ``tokens`` of the answer took ``eval_s`` seconds, while ``mean_streams`` streams ran, this one included.
        ``unread_tokens`` of the prompt, which were not in the server's cache, took ``prompt_s`` seconds, while
        ``mean_prefills`` prompts were read, this one included. ``load_s`` is how long the request waited for a load.
        """
        self._note_change()
        self._learn_decode(model, tokens, eval_s, mean_streams, 1.0)
        if prompt_s is not None and 1.0 <= mean_prefills <= MAX_STREAMS:
            prompt_s /= mean_prefills  # prompts that are read at the same time share the GPU
        self._learn_prefill(model, unread_tokens, prompt_s, 1.0)
        self._learn_load(model, load_s)

    def learn_from_clock(
        self,
        model: str,
        *,
        tokens: int | None,
        stream_s: float | None,
        mean_streams: float = 1.0,
        unread_tokens: int | None = None,
        ttft_s: float | None = None,
    ) -> None:
        """Learns from the gateway's own clock, for a server that gives no durations. These figures count less.

        ``tokens`` of the answer came, the last one ``stream_s`` seconds after the first. ``ttft_s``: the seconds from
        the sending of the request to the first token, less the round trip; the request may have waited meanwhile.
        """
        self._note_change()
        intervals = None if tokens is None else tokens - 1  # the first token came at the beginning
        self._learn_decode(model, intervals, stream_s, mean_streams, CLOCK_WEIGHT)
        weight = CLOCK_WEIGHT
        if unread_tokens is not None and ttft_s is not None and ttft_s > self.prefill_s(model, unread_tokens):
            weight *= WAIT_WEIGHT
        self._learn_prefill(model, unread_tokens, ttft_s, weight)

    def _learn_decode(
        self, model: str, tokens: int | None, eval_s: float | None, streams: float, weight: float
    ) -> None:
        """Learns the rate of decoding from an answer of this number of tokens. ``streams`` ran on the mean, this one
        included. ``weight``: how much the answer counts if it is long enough. Impossible figures are ignored."""
        if tokens is None or eval_s is None or not MIN_DECODED_TOKENS <= tokens <= MAX_TOKENS:
            return
        token_s = eval_s / tokens
        # Each comparison is false for NaN. A mean of slightly less than one stream comes from two clocks.
        if not (MIN_TOKEN_S <= token_s <= MAX_TOKEN_S and 0.0 <= streams <= MAX_STREAMS):
            return
        neighbours = max(streams - 1.0, 0.0)
        fleet = self if self._fallback is None else self._fallback
        usual_share = fleet._usual_shares.get(model, DEFAULT_SHARE)
        rate = self._decode.get(model)
        if rate is None:
            rate = DecodeRate(token_s / (1.0 + usual_share * neighbours), usual_share)
            _add_bounded(self._decode, model, rate)
        rate.prior_share = usual_share
        rate.learn(token_s, neighbours, weight * min(tokens / FULL_WEIGHT_TOKENS, 1.0))
        if self._fallback is not None:
            self._fallback._note_share(model, rate.share, neighbours)
        self._last_decode = rate

    def _note_share(self, model: str, share: float, neighbours: float) -> None:
        """Notes the share that a node of the fleet has learned from an answer with this number of neighbours."""
        usual = self._usual_shares.get(model)
        if usual is None:
            usual = DEFAULT_SHARE
            _add_bounded(self._usual_shares, model, usual)
        self._usual_shares[model] = usual + SHARE_WEIGHT * min(neighbours, 1.0) * (share - usual)

    def _learn_prefill(self, model: str, tokens: int | None, prompt_s: float | None, weight: float) -> None:
        """Learns the rate of reading from this number of tokens of a prompt. ``weight``: how much each token counts.
        Impossible figures are ignored."""
        if tokens is None or prompt_s is None or not MIN_READ_TOKENS <= tokens <= MAX_TOKENS:
            return
        token_s = prompt_s / tokens
        if not MIN_READ_S <= token_s <= MAX_READ_S:
            return
        rate = self._prefill.get(model)
        if rate is None:
            rate = PrefillRate(token_s)
            _add_bounded(self._prefill, model, rate)
        rate.learn(token_s, weight * min(tokens, FULL_WEIGHT_READ))
        self._last_prefill = rate

    def _learn_load(self, model: str, load_s: float | None) -> None:
        """Learns the time of a load. Impossible figures are ignored."""
        if load_s is None or not MIN_LOAD_S <= load_s <= MAX_LOAD_S:
            return
        known_s = self._load.get(model)
        if known_s is None:
            _add_bounded(self._load, model, load_s)
        else:
            # The server's figure also covers the wait for other loads, and for answers that had to end first. So a time
            # that is longer than the known one counts less than a shorter one.
            weight = LOAD_WEIGHT if load_s < known_s else LOAD_WEIGHT * WAIT_WEIGHT
            bounded_s = min(max(load_s, known_s / MAX_STEP), known_s * MAX_STEP)
            self._load[model] = known_s + weight * (bounded_s - known_s)
        self._last_load = self._load[model]

    # -- storing -------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, object]:
        """The rates in types that JSON has. Models with a name of more than ``MAX_NAME_CHARS`` are left out."""
        decode = {model: {"token_s": rate.token_s, "share": rate.share} for model, rate in _storable(self._decode)}
        prefill = {model: rate.token_s for model, rate in _storable(self._prefill)}
        return {"format": FORMAT, "decode": decode, "prefill": prefill, "load": dict(_storable(self._load))}

    def restore(self, document: object) -> None:
        """Takes the rates that ``as_dict`` has stored, for the models that have not been measured yet. They count as
        few answers, so new answers soon outweigh them. Raises ValueError for a document of another form, and then takes
        nothing of it."""
        stored = msgspec.convert(document, _StoredRates)
        self._note_change()
        for model, decode in stored.decode.items():
            if model not in self._decode:
                self._last_decode = DecodeRate.restore(decode.token_s, decode.share)
                _add_bounded(self._decode, model, self._last_decode)
        for model, token_s in stored.prefill.items():
            if model not in self._prefill:
                self._last_prefill = PrefillRate.restore(token_s)
                _add_bounded(self._prefill, model, self._last_prefill)
        for model, load_s in stored.load.items():
            if model not in self._load:
                self._last_load = load_s
                _add_bounded(self._load, model, load_s)

    def replace(self, document: object) -> None:
        """As ``restore``, but also for the models that have been measured, because the document is newer."""
        stored = msgspec.convert(document, _StoredRates)
        for known, newer in ((self._decode, stored.decode), (self._prefill, stored.prefill), (self._load, stored.load)):
            for model in newer:
                known.pop(model, None)
        self.restore(document)


def _storable(values: dict[str, _Value]) -> Iterator[tuple[str, _Value]]:
    """The models, with their values, whose names are not too long to be stored."""
    return ((model, value) for model, value in values.items() if len(model) <= MAX_NAME_CHARS)


def _add_bounded(values: dict[str, _Value], model: str, value: _Value) -> None:
    """Adds the value of a model that has none yet. Beyond ``MAX_MODELS``, the model that was added first is removed."""
    values[model] = value
    if len(values) > MAX_MODELS:
        del values[next(iter(values))]
