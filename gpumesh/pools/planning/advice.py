"""What would fit instead of a pool that does not, and what would make one that fits better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import HostOffer, PoolPlan, SpeedForecast, WorkerPath
from gpumesh.pools.planning.alternatives import describe_gib, describe_what_fits, find_single_nodes
from gpumesh.pools.planning.choice import fits_on_all
from gpumesh.pools.planning.hosts import gather_hosts
from gpumesh.pools.planning.problems import describe_problem
from gpumesh.pools.planning.speed import forecast_way_ms
from gpumesh.pools.planning.split import Model
from gpumesh.text.sentences import join_all

# One node alone is advised only if it is so much faster.
CLEARLY_FASTER = 1.15
# A way that takes less for each token is not worth a sentence.
LEAST_WAY_MS = 5.0
# Round trips dominate from this part of a token's time on.
DOMINANT_PART = 0.5
MOST_VOCABULARY_DIFFERENCE = 128  # SPEC_VOCAB_MAX_SIZE_DIFFERENCE in llama.cpp's common/speculative.cpp


def advice_if_too_large(
    spec: PoolSpec, model: Model, offers: Sequence[HostOffer], paths: Mapping[str, WorkerPath], *, draft_bytes: int
) -> Iterator[str]:
    """One sentence for each change that would be enough alone. ``draft_bytes``: what the draft model needs."""
    holders = [offer.node for offer in offers if any(device.held_by_others for device in offer.devices)]
    if holders and not spec.unload:
        unloaded = gather_hosts(spec, offers, paths, draft_bytes=draft_bytes, unload=True)
        if fits_on_all(model, unloaded):
            yield f"It would fit if Ollama on {join_all(holders)} unloaded its models (unload: true)."
    hosts = gather_hosts(spec, offers, paths, draft_bytes=0, unload=spec.unload)
    if draft_bytes and fits_on_all(model, hosts):
        yield "It would fit without the draft model."
    hosts = gather_hosts(spec, offers, paths, draft_bytes=draft_bytes, unload=spec.unload)
    if spec.split is not None and fits_on_all(model, hosts):
        yield "It would fit with the split that the plan finds: leave `split` out."
        return
    yield from describe_what_fits(spec, model.shape, hosts)


def advice_if_it_fits(spec: PoolSpec, plan: PoolPlan, offers: Sequence[HostOffer]) -> Iterator[str]:
    broken = [offer for offer in offers if offer.problem is not None]
    yield from (describe_problem(offer) for offer in broken)
    unable = {spec.head, *(offer.node for offer in broken)}
    spare = [member.node for member in plan.members if not member.layers and member.node not in unable]
    if spare and spec.split is None:
        yield f"{join_all(spare)} {'is' if len(spare) == 1 else 'are'} not needed, and the pool is faster without."
    if plan.shape.trained_context is not None and spec.context > plan.shape.trained_context:
        yield f"The model was trained for {plan.shape.trained_context} tokens, and context: {spec.context} is more."
    if plan.draft is not None and abs(plan.draft.vocabulary - plan.shape.vocabulary) > MOST_VOCABULARY_DIFFERENCE:
        yield "The draft model has another vocabulary: hardly a token of it will be taken over."
    yield from _advice_of_single_nodes(spec, plan, offers)
    yield from _advice_of_unknown_speed(plan)
    if plan.speed is not None and plan.draft is None and plan.workers and _round_trips_dominate(plan.speed):
        yield (
            f"Round trips are {plan.speed.round_trips_ms:.0f} ms of the {_token_ms(plan.speed):.0f} ms for a token. "
            "With a small model of the same family (draft:), one set of round trips yields several tokens; for text "
            "that repeats itself, draft: ngram does it without a model. Streams that are decoded together (parallel:) "
            "share them."
        )


def _advice_of_unknown_speed(plan: PoolPlan) -> Iterator[str]:
    way_ms = forecast_way_ms(plan.shape, plan.members, context=plan.context)
    if plan.speed is None and way_ms is not None and way_ms >= LEAST_WAY_MS:
        yield (
            "How fast the devices compute is not known. "
            f"The ways to the workers alone allow one stream at most {1000 / way_ms:.0f} tokens/s."
        )


def _advice_of_single_nodes(spec: PoolSpec, plan: PoolPlan, offers: Sequence[HostOffer]) -> Iterator[str]:
    if not plan.workers:
        yield f"{plan.head.node} holds the whole model alone: it needs no pool."
        return
    rate = None if plan.speed is None else plan.speed.draft_tokens_per_s or plan.speed.tokens_per_s
    for single in find_single_nodes(spec, plan.shape, offers):
        gain = single.tokens_per_s / rate if single.tokens_per_s is not None and rate is not None else 1.0
        if single.file_type is None and gain >= 1:
            yield f"{single.node} alone holds the whole model: with it as the head, no other node is needed."
        elif single.file_type is not None and gain > CLEARLY_FASTER:
            yield (
                f"{single.node} alone would be faster with the quantisation {single.file_type} "
                f"({describe_gib(single.file_bytes)}): {_rate(single.tokens_per_s)} tokens/s instead of {_rate(rate)}."
            )


def _round_trips_dominate(speed: SpeedForecast) -> bool:
    return speed.round_trips_ms > DOMINANT_PART * _token_ms(speed)


def _token_ms(speed: SpeedForecast) -> float:
    return speed.round_trips_ms + speed.compute_ms


def _rate(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return "?"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 10 else f"{tokens_per_s:.0f}"
