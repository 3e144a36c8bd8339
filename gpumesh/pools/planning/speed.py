"""How fast a pool will be: tokens per second for one stream and for several, with a draft model, and its load time.

A step decodes one token of each stream. Its time is that in which each device reads its layers' weights and the used
part of the KV cache, one device after the other, and that of the ways to the workers (``rpc_traffic``).
benchmarks/pool_speed.py compares the forecast with llama-server; docs/internals/pools.md has the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpumesh.pools.base import DeviceOffer, DeviceShare, MemberPlan, ModelShape, PathKind, SpeedForecast, WorkerPath
from gpumesh.pools.planning.rpc_traffic import (
    GRAPH_TOKENS,
    WorkerTraffic,
    estimate_load,
    estimate_new_graph,
    estimate_prompt,
    estimate_step,
)

# The part of a draft model's tokens that the model takes over, until it has been measured.
ASSUMED_ACCEPTANCE = 0.7
LONGEST_DRAFT = 16
# How much longer a step takes for each further token in it, as a part of the step of one token. A GPU waits for its
# memory, and further tokens use the same weights. By llama.cpp's pull request 15802 an RTX 3090 needs 6.4 ms for one
# token of a model of 8B in Q4_0, 8.5 ms for four, 13.7 ms for eight. A CPU has little spare computing power.
GPU_TOKEN_COST = 0.11
CPU_TOKEN_COST = 0.5
# New graphs in an answer of GRAPH_TOKENS tokens: when its decoding begins, and when the context grows. With several
# streams, each answer changes the form of the steps when it begins and when it ends.
GRAPHS_PER_ANSWER = 2
# The head reads the file, and computes a hash of each large tensor that goes to a worker, byte by byte. A worker with a
# cache does the same and writes the tensor, or reads it. It answers the next question only after that.
FILE_BYTES_PER_S = 1.5e9
HASH_BYTES_PER_S = 0.8e9
START_S = 0.5  # llama-server's own start, without the model


@dataclass(frozen=True, slots=True)
class LoadForecast:
    """The weights that go to workers on other hosts, and the seconds until the pool answers (``None``: unknown)."""

    sent_bytes: int
    load_s: float | None


def forecast_speed(
    shape: ModelShape,
    members: Sequence[MemberPlan],
    *,
    context: int,
    parallel: int,
    draft: ModelShape | None = None,
    draft_acceptance: float = ASSUMED_ACCEPTANCE,
    draft_length: int | None = None,
    filled: float | None = None,
) -> SpeedForecast | None:
    """How fast the pool decodes; ``None`` if a device's ``bytes_per_s`` or a worker's ``rtt_ms`` is not known.

    - ``context`` is that of one stream. ``filled``: how many tokens of it are used; ``None``: half of them.
    - ``draft`` runs on the head, on its fastest device. ``draft_acceptance``: the probability that a token of it is
      taken over. ``draft_length``: the tokens that it proposes for a step; ``None``: as many as make the pool fastest.
    """
    pool = _Pool(shape, tuple(members), context, parallel, context / 2 if filled is None else filled)
    if not pool.is_known:
        return None
    one, all_streams = pool.step(tokens=1, streams=1), pool.step(tokens=parallel, streams=parallel)
    forecast = SpeedForecast(
        tokens_per_s=1 / one.total_s,
        streams=parallel,
        tokens_per_s_streams=parallel / all_streams.total_s,
        compute_ms=one.compute_s * 1000,
        round_trips_ms=one.way_s * 1000,
    )
    device = pool.draft_device()
    if draft is None or device is None:
        return forecast
    lengths = range(1, LONGEST_DRAFT + 1) if draft_length is None else (draft_length,)
    rates = {length: pool.draft_rate(draft, device, length, draft_acceptance) for length in lengths}
    best = max(rates, key=rates.__getitem__)
    return replace(forecast, draft_tokens_per_s=rates[best], draft_acceptance=draft_acceptance, draft_length=best)


def forecast_load(
    shape: ModelShape, members: Sequence[MemberPlan], *, cached: frozenset[str] = frozenset()
) -> LoadForecast:
    """What the start of the pool sends to workers on other hosts, and how long it takes until the pool answers.

    ``cached``: the nodes whose workers have the weights in their cache already. The weights go to one worker after the
    other, in the order of the file. ``load_s`` is ``None`` if a way's ``rtt_ms`` or ``bytes_per_s`` is not known.
    """
    sent_bytes = 0
    load_s: float | None = START_S + shape.file_bytes / FILE_BYTES_PER_S
    for member in members:
        weights = sum(share.weights_bytes for share in member.shares)
        if member.path is None or not weights:
            continue
        traffic = estimate_load(
            shape,
            layers=_count_layers(shape, member),
            weights_bytes=weights,
            is_cached=member.node in cached,
            protocol=member.path.protocol,
        )
        if member.path.kind is not PathKind.LOCAL:
            sent_bytes += int(traffic.sent_bytes)
        way_s = _way_s(member.path, traffic, needs_rate=member.path.kind is not PathKind.LOCAL)
        hashes = 1 if member.node in cached else 2
        worker_s = weights * (hashes / HASH_BYTES_PER_S + 1 / FILE_BYTES_PER_S)
        load_s = None if load_s is None or way_s is None else load_s + way_s + worker_s
    return LoadForecast(sent_bytes, load_s)


def forecast_way_ms(shape: ModelShape, members: Sequence[MemberPlan], *, context: int) -> float | None:
    """The milliseconds that a token of one stream waits for the ways to the workers. One stream reaches at most
    1000 / this tokens per second, however fast the devices are. ``None`` if a worker's ``rtt_ms`` is not known."""
    pool = _Pool(shape, tuple(members), context, 1, context / 2)
    return pool.way_s(tokens=1, streams=1) * 1000 if pool.ways_are_known else None


def forecast_prompt_way_s(shape: ModelShape, members: Sequence[MemberPlan], *, tokens: int) -> float | None:
    """The seconds that the ways to the workers add to the time until the first token of a prompt of ``tokens`` tokens.
    ``None`` if a worker's ``rtt_ms`` is not known. The computing comes on top."""
    total_s = 0.0
    for member in members:
        if member.path is None or not member.layers:
            continue
        has_output = any(_has_output(shape, share) for share in member.shares)
        traffic = estimate_prompt(
            shape,
            tokens=tokens,
            layers=_count_layers(shape, member),
            has_output=has_output,
            protocol=member.path.protocol,
        )
        way_s = _way_s(member.path, traffic)
        if way_s is None:
            return None
        total_s += way_s
    return total_s


@dataclass(frozen=True, slots=True)
class _Step:
    """The time of one decoded step: on the devices, and on the ways to the workers."""

    compute_s: float
    way_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.way_s


@dataclass(frozen=True, slots=True)
class _Pool:
    """A pool while it decodes, with ``filled`` tokens in each stream's context."""

    shape: ModelShape
    members: tuple[MemberPlan, ...]
    context: int
    parallel: int
    filled: float

    @property
    def ways_are_known(self) -> bool:
        """Whether the round trip to each worker is known."""
        paths = [member.path for member in self.members if member.layers and member.path is not None]
        return all(path.rtt_ms is not None for path in paths)

    @property
    def is_known(self) -> bool:
        """Whether the rate of each used device, and the round trip to each worker, are known."""
        rates = [share.device.bytes_per_s for member in self.members for share in member.shares if share.layers]
        return bool(rates) and all(rates) and self.ways_are_known

    def step(self, *, tokens: int, streams: int, progress: float = 1.0) -> _Step:
        """One step of ``tokens`` tokens, which belong to so many streams. Each stream gains ``progress`` tokens."""
        shares = [share for member in self.members for share in member.shares if share.layers]
        compute_s = sum(self._compute_s(share, tokens, streams) for share in shares)
        return _Step(compute_s, self.way_s(tokens=tokens, streams=streams, progress=progress))

    def way_s(self, *, tokens: int, streams: int, progress: float = 1.0) -> float:
        """The seconds of a step on the ways to the workers, each of which is passed after the one before it."""
        graphs = GRAPHS_PER_ANSWER * streams * progress / GRAPH_TOKENS
        way_s = 0.0
        for member in self.members:
            if member.path is None:
                continue
            for share in member.shares:
                if share.layers:
                    has_output = _has_output(self.shape, share)
                    filled = self.filled * streams
                    traffic = estimate_step(self.shape, tokens=tokens, filled=filled, has_output=has_output)
                    layers = share.layers - has_output
                    new_graph = estimate_new_graph(self.shape, layers, protocol=member.path.protocol)
                    traffic = traffic + new_graph.scale(graphs)
                    way_s += _way_s(member.path, traffic) or 0.0
        return way_s

    def draft_device(self) -> DeviceOffer | None:
        """The head's fastest device, which computes the draft model; ``None`` if the rate of none is known."""
        devices = [share.device for member in self.members if member.is_head for share in member.shares]
        known = [device for device in devices if device.bytes_per_s]
        return max(known, key=lambda device: device.bytes_per_s or 0.0, default=None)

    def draft_rate(self, draft: ModelShape, device: DeviceOffer, length: int, acceptance: float) -> float:
        """Tokens per second of one stream, if the draft model proposes ``length`` tokens for each step.

        A step yields the tokens up to the first that is not taken over, and one of the model's own: the sum of
        ``acceptance ** n`` for n from 0 to ``length`` (Leviathan et al., 2023, "Fast Inference from Transformers via
        Speculative Decoding", equation 1). llama-server's draft model computes one token after the other, and then the
        whole step once more (common/speculative.cpp, ``draft`` and ``process``).
        """
        yielded = sum(acceptance**n for n in range(length + 1))
        step = self.step(tokens=length + 1, streams=1, progress=yielded)
        weights = sum(draft.layer_bytes)
        draft_s = length * _device_s(device, _read_bytes(draft, weights, tokens=1) + draft.output_bytes, tokens=1)
        draft_s += _device_s(device, _read_bytes(draft, weights, tokens=length + 1), tokens=length + 1)
        return yielded / (step.total_s + draft_s)

    def _compute_s(self, share: DeviceShare, tokens: int, streams: int) -> float:
        layers = self.shape.layer_bytes[share.first_layer : share.first_layer + share.layers]
        weights = _read_bytes(self.shape, sum(layers), tokens=tokens)
        if _has_output(self.shape, share):
            weights += self.shape.output_bytes
        cache = share.kv_bytes * (self.filled / self.context) * (streams / self.parallel)
        return _device_s(share.device, weights, tokens=tokens) + _device_s(share.device, cache, tokens=1)


def _device_s(device: DeviceOffer, read_bytes: float, *, tokens: int) -> float:
    """The seconds in which the device computes so many tokens with weights of ``read_bytes``."""
    assumed_cost = CPU_TOKEN_COST if device.index is None else GPU_TOKEN_COST
    token_cost = assumed_cost if device.token_cost is None else device.token_cost
    assert device.bytes_per_s is not None  # the caller has made sure
    return read_bytes * (1 + token_cost * (tokens - 1)) / device.bytes_per_s


def _has_output(shape: ModelShape, share: DeviceShare) -> bool:
    return share.layers > 0 and share.first_layer + share.layers > shape.layers


def _count_layers(shape: ModelShape, member: MemberPlan) -> int:
    """The member's layers without the output."""
    return member.layers - any(_has_output(shape, share) for share in member.shares)


def _read_bytes(shape: ModelShape, layer_bytes: int, *, tokens: int) -> float:
    """The bytes of these layers' weights that a step of ``tokens`` tokens reads. With experts, these are the ones that
    the tokens use, if each token chooses evenly among them."""
    if not shape.experts or not shape.layers:
        return layer_bytes
    expert_numbers = 3 * shape.experts * shape.embedding * shape.feed_forward * shape.layers
    in_experts = min(1.0, expert_numbers / max(1, shape.parameters - 2 * shape.vocabulary * shape.embedding))
    used = 1 - (1 - shape.experts_used / shape.experts) ** tokens
    return layer_bytes * (1 - in_experts + in_experts * used)


def _way_s(path: WorkerPath, traffic: WorkerTraffic, *, needs_rate: bool = False) -> float | None:
    """The seconds that the traffic takes on the way; ``None`` if the round trip is not known, or the rate is not and
    ``needs_rate``. Without a rate the bytes count nothing."""
    if path.rtt_ms is None or (needs_rate and path.bytes_per_s is None):
        return None
    size = traffic.sent_bytes + traffic.received_bytes
    return traffic.waits * path.rtt_ms / 1000 + (size / path.bytes_per_s if path.bytes_per_s else 0.0)
