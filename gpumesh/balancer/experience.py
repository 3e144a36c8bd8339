"""``Experience``: what was learned from earlier requests, and the expected work of the next request by it. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from gpumesh.backends.base import ServerCounters
from gpumesh.balancer.account import NodeAccount, PlacedRequest
from gpumesh.balancer.base import Demand, ResidencyKey
from gpumesh.balancer.fairness.client_counters import weighted_tokens
from gpumesh.balancer.lengths import ExpectedLengths
from gpumesh.balancer.prefixes import PrefixIndex, PromptPrint
from gpumesh.balancer.prefixes.cache_size import BYTES_PER_TOKEN, count_read_tokens
from gpumesh.balancer.prefixes.prints import FIRST_BLOCK_BYTES
from gpumesh.balancer.rates import ServiceRates
from gpumesh.balancer.rates.token_counts import TokenCounts
from gpumesh.balancer.work import NOTHING_CACHED, Work

MIN_CLOCKED_TOKENS = 16  # a shorter stream often comes in a few packets
MOST_READS = 1.5  # prompts that were read at once, on the mean
MOST_READS_FOR_CACHE = 1.1  # the same, if the number of tokens read is estimated from the time of the reading
FLEET_LEARN_INTERVAL_S = 0.02  # the rates of the fleet learn from at most one answer in this time
MIN_PROMPT_BYTES = 200  # a shorter prompt is mostly the template's own tokens
MIN_ANSWER_BYTES = 64  # in a shorter answer, the last token counts too much: it has no text


class Experience:
    """What was learned from earlier requests of all nodes. What concerns one node alone is in its account."""

    def __init__(self) -> None:
        self.lengths = ExpectedLengths()
        self.fleet_rates = ServiceRates()
        """Learned from all nodes, and used for a node whose own rates were not measured yet."""
        self.prefixes = PrefixIndex()
        self.on_prompt_placed: Callable[[str, ResidencyKey, PromptPrint], None] | None = None
        """Called with the node, the key and the prompt of each request whose prompt is known, for other gateways."""
        self._fleet_learned_at = -math.inf  # when the fleet's rates learned last
        self._prompt_counts = TokenCounts(least_bytes=MIN_PROMPT_BYTES, may_hold_images=True)
        self._answer_counts = TokenCounts(least_bytes=MIN_ANSWER_BYTES, may_hold_images=False)

    # -- before a request ----------------------------------------------------------------------------------------

    def estimate(self, demand: Demand) -> Work:
        """The expected work of a request, and how much of its prompt the nodes have in their caches."""
        key = demand.residency
        model = "" if key is None else key.model
        # At least 1, because a client may ask for no token at all.
        answer_tokens = max(self.lengths.expect(demand.client, demand.route, model, demand.max_tokens), 1.0)
        if demand.prompt_tokens is None and demand.prompt is None and demand.session is None:  # most short requests
            return Work(0.0, answer_tokens)
        bytes_per_token = self._prompt_counts.bytes_per_token(model)
        prompt_tokens = _prompt_bytes(demand) / bytes_per_token
        cached: Mapping[str, float] = NOTHING_CACHED
        if key is not None and (demand.prompt is not None or demand.session is not None):
            cached_bytes = self._find_cached(key, demand)
            cached = {node: size / bytes_per_token for node, size in cached_bytes.items()}
        return Work(prompt_tokens, answer_tokens, cached)

    def _find_cached(self, key: ResidencyKey, demand: Demand) -> Mapping[str, int]:
        """How many bytes of the prompt the nodes have in their caches. A prompt that is shorter than a block is found
        by its session alone."""
        session = _session_id(demand)
        if demand.prompt is not None:
            return self.prefixes.match(key, demand.prompt, session)
        return {} if session is None else self.prefixes.match_session(key, session, int(_prompt_bytes(demand)))

    def find_session_node(self, demand: Demand) -> str | None:
        """The node that had the last request of this session; ``None`` if the client names no session, or if no node
        has had it lately."""
        session = _session_id(demand)
        if demand.residency is None or session is None:
            return None
        return next(reversed(self.prefixes.match_session(demand.residency, session, 1)), None)

    def displaced_tokens(self, demand: Demand, node: str) -> float:
        """How many tokens of other prompts the node's server would forget for this one."""
        key = demand.residency
        if demand.prompt is None or key is None:
            return 0.0
        return self.prefixes.displaced_bytes(node, key) / self._prompt_counts.bytes_per_token(key.model)

    def forget_prompts(self, node: str, model: str) -> None:
        """Forgets the prompts that the node had in its cache for this model: its server has unloaded the model."""
        for key in self.prefixes.keys_of(node):
            if isinstance(key, ResidencyKey) and key.model == model:
                self.prefixes.forget(node, key)

    # -- after a request -----------------------------------------------------------------------------------------

    def note_placed(self, placed: PlacedRequest, now: float) -> None:
        """Notes that the node has this request's prompt in its cache from now on, so that later requests with the same
        beginning, or of the same session, are sent there too. If the prompt is not known or too short, only its session
        is noted."""
        key, prompt = placed.key, placed.demand.prompt
        if key is None:  # the request loads no model, so it leaves nothing in a cache
            return
        node, session = placed.account.name, _session_id(placed.demand)
        if prompt is not None:
            self.prefixes.add(node, key, prompt, now)
            if self.on_prompt_placed is not None:
                self.on_prompt_placed(node, key, prompt)
        if session is not None:
            # The answer will be in the cache too. It is a part of the session's next prompt: most of that prompt, if
            # the first prompt was short.
            size = _prompt_bytes(placed.demand) if prompt is None else prompt.size
            size += placed.work.answer_tokens * self._answer_counts.bytes_per_token(key.model)
            self.prefixes.note_session(node, key, session, int(size))

    def learn_from_answer(
        self, placed: PlacedRequest, counters: ServerCounters, now: float, *, mean_streams: float, stalled_share: float
    ) -> None:
        """Learns from the server's figures for a whole answer, or from our clock if the server gives no durations.

        ``mean_streams``: the mean number of answers that were written at the same time, this one included.
        ``stalled_share``: the share of the time since its first token in which the node read other prompts."""
        account, demand = placed.account, placed.demand
        model = placed.model or ""
        if placed.key is None:
            return
        tokens = counters.tokens
        # The server's load_duration includes the wait until other models were unloaded (``drain_s``). If the request
        # came while the model was loading, the duration is only a part of the load, so nothing is learned from it.
        load_s = None
        if placed.drain_s is not None and counters.load_ms is not None:
            load_s = counters.load_ms / 1000.0 - placed.drain_s
        eval_s = _seconds(counters.eval_ms)
        if eval_s is not None:
            expected_s = account.rates.decode_s(model, tokens or 0, mean_streams)
            account.read_stall.learn(eval_s, expected_s, stalled_share)
            eval_s = account.read_stall.clean(eval_s, stalled_share)
        elif counters.prompt_ms is None:
            self._learn_from_clock(placed, counters, now, mean_streams, stalled_share)
        for rates in self._choose_rates(account, model, now, has_load=load_s is not None):
            rates.learn(
                model,
                tokens=tokens,
                eval_s=eval_s,
                mean_streams=mean_streams,
                unread_tokens=_count_unread(placed, counters),
                prompt_s=_seconds(counters.prompt_ms),
                mean_prefills=placed.mean_reads,
                load_s=load_s,
            )
        self._learn_cache_size(placed, counters)
        if tokens is not None:
            self.lengths.learn(demand.client, demand.route, model, tokens)

    def learn_counts(self, placed: PlacedRequest, counters: ServerCounters) -> None:
        """Learns from the server's counts of tokens how many bytes make a token."""
        node, model = placed.account.name, placed.model or ""
        self._prompt_counts.learn(node, model, counters.prompt_tokens, _known_prompt_bytes(placed))
        self._answer_counts.learn(node, model, counters.tokens, placed.answer_bytes)

    def correct_counts(self, placed: PlacedRequest, counters: ServerCounters) -> ServerCounters:
        """The counters with counts of tokens that agree with the bytes that we know."""
        node, model = placed.account.name, placed.model or ""
        prompt_bytes = _known_prompt_bytes(placed)
        prompt_tokens = self._prompt_counts.correct(node, model, counters.prompt_tokens, prompt_bytes)
        tokens = self._answer_counts.correct(node, model, counters.tokens, placed.answer_bytes)
        if prompt_tokens == counters.prompt_tokens and tokens == counters.tokens:
            return counters
        return replace(counters, prompt_tokens=prompt_tokens, tokens=tokens)

    def true_cost(self, placed: PlacedRequest, counters: ServerCounters) -> float | None:
        """The true cost of the request in weighted tokens, by the corrected counters; ``None`` if they lack the tokens
        of the answer."""
        if counters.tokens is None:
            return None
        prompt_tokens = counters.prompt_tokens
        return weighted_tokens(
            placed.work.prompt_tokens if prompt_tokens is None else float(prompt_tokens), float(counters.tokens)
        )

    def cost_correction(self, placed: PlacedRequest, counters: ServerCounters | None) -> float:
        """The true cost of a request that has ended minus its expected cost, in weighted tokens; 0 if the true cost is
        not known, and minus the expected cost if the server gave nothing. ``counters`` are the server's figures for a
        whole answer; ``None``: the answer is not whole."""
        if counters is None:
            return -placed.work.cost if placed.first_token_at is None else 0.0
        cost = self.true_cost(placed, self.correct_counts(placed, counters))
        return 0.0 if cost is None else cost - placed.work.cost

    def _choose_rates(self, account: NodeAccount, model: str, now: float, *, has_load: bool) -> Sequence[ServiceRates]:
        """The rates that learn from an answer: the rates of its node, and often also the rates of the fleet. In a large
        fleet there are so many answers that a part of them is enough for the fleet's rates. ``has_load``: the answer
        has waited for a load. Such answers are few, so the fleet learns from each."""
        is_due = now >= self._fleet_learned_at + FLEET_LEARN_INTERVAL_S
        if is_due or has_load or not self.fleet_rates.is_measured(model):
            self._fleet_learned_at = now
            return (account.rates, self.fleet_rates)
        return (account.rates,)

    def _learn_from_clock(
        self, placed: PlacedRequest, counters: ServerCounters, now: float, mean_streams: float, stalled_share: float
    ) -> None:
        """Learns the rates of a server that gives no durations (vLLM, most servers of OpenAI's API)."""
        account, model = placed.account, placed.model or ""
        ttft_s: float | None = None
        unread_tokens: int | None = None
        # If a model was loaded or other prompts were read, the time to the first token is not the time of the reading.
        if placed.first_token_at is not None and not placed.needs_load and placed.mean_reads <= MOST_READS:
            ttft_s = placed.first_token_at - placed.sent_at - account.rtt_s
            unread_tokens = _count_unread(placed, counters)
            if counters.prompt_tokens is None and not placed.cached_tokens:
                # Our own estimate is enough: the forecasts, which use the rate, estimate in the same way.
                unread_tokens = int(placed.unread_tokens)
        stream_s = measure_stream_s(placed, counters, now)
        if stream_s is not None:
            stream_s = account.read_stall.clean(stream_s, stalled_share)
        for rates in self._choose_rates(account, model, now, has_load=False):
            rates.learn_from_clock(
                model,
                tokens=counters.tokens,
                stream_s=stream_s,
                mean_streams=mean_streams,
                unread_tokens=unread_tokens,
                ttft_s=ttft_s,
            )

    def _learn_cache_size(self, placed: PlacedRequest, counters: ServerCounters) -> None:
        """Compares the part of the prompt that the server has read with the part that we believed to be in its
        cache."""
        prompt, key, account = placed.demand.prompt, placed.key, placed.account
        if prompt is None or key is None:
            return
        read_tokens = count_read_tokens(counters, account.rates.measured_prefill(key.model))
        loaded = account.residency.loaded.get(key.model)
        bytes_per_token = self._prompt_counts.bytes_per_token(key.model)
        self.prefixes.set_capacity(
            account.name,
            key,
            # The time is infinite, so that the number includes the slot that is tried out next, if any.
            slots=account.slots(key.model, math.inf),
            context_tokens=None if loaded is None else loaded.context_length,
            bytes_per_token=bytes_per_token,
        )
        # A prompt takes longer while other prompts are read. The time would seem to be that of a whole prompt, and the
        # cache would seem to be too small.
        is_sure = counters.cached_tokens is not None or placed.mean_reads <= MOST_READS_FOR_CACHE
        if is_sure and read_tokens is not None and counters.prompt_tokens is not None:
            self.prefixes.learn(
                account.name,
                key,
                prompt_bytes=prompt.size,
                believed_bytes=int(placed.cached_tokens * bytes_per_token),
                prompt_tokens=counters.prompt_tokens,
                read_tokens=read_tokens,
            )


def measure_stream_s(placed: PlacedRequest, counters: ServerCounters, now: float) -> float | None:
    """The seconds from the first token to the last, by our clock at the end of the answer. ``None`` if this says
    nothing about the node: the answer is too short, its client was slow, or nobody knows when it began.

    A text that comes in one piece has begun when the round trip was over and its prompt was read, if its request had
    neither a load nor another request to wait for."""
    if placed.had_slow_client or (counters.tokens or 0) < MIN_CLOCKED_TOKENS:
        return None
    if placed.first_token_at is not None:
        return now - placed.first_token_at
    if not placed.demand.is_whole_text or placed.needs_load or _may_have_waited(placed):
        return None
    return now - placed.sent_at - placed.account.rtt_s - placed.read_s


def _may_have_waited(placed: PlacedRequest) -> bool:
    """Whether the request was sent beyond the proven number of slots, and so may have waited inside the server."""
    sent = placed.sent
    return sent is not None and sent.concurrent > placed.account.learned_slots.limit(sent.model).proven


def _session_id(demand: Demand) -> int | None:
    """The number that stands for the request's conversation; ``None`` if its client named none."""
    return None if demand.session is None else hash(demand.session)


def _prompt_bytes(demand: Demand) -> float:
    """About how many bytes a prompt has. The size of a short prompt is not known. It counts as 0, because its reading
    takes hardly any time. But if the client names a session, it counts as one block, so that the node which has had the
    session is preferred."""
    if demand.prompt_tokens is not None:
        return demand.prompt_tokens * BYTES_PER_TOKEN
    if demand.session is None:
        return 0.0
    return float(FIRST_BLOCK_BYTES if demand.prompt is None else demand.prompt.size)


def _known_prompt_bytes(placed: PlacedRequest) -> float | None:
    """About how many bytes the whole prompt has; ``None`` for a short prompt, whose size is not known."""
    prompt_tokens = placed.demand.prompt_tokens
    return None if prompt_tokens is None else prompt_tokens * BYTES_PER_TOKEN


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000.0


def _count_unread(placed: PlacedRequest, counters: ServerCounters) -> int | None:
    """How many tokens of the prompt the server had to read. ``None`` if this is not certain: the server does not count
    tokens, or it may have had a part of the prompt in its cache, and does not report the size of this part."""
    if counters.prompt_tokens is None:
        return None
    if counters.cached_tokens is not None:
        return counters.prompt_tokens - counters.cached_tokens
    if placed.cached_tokens:
        return None
    return counters.prompt_tokens
