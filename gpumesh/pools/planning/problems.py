"""Why a pool cannot be started as it is written, and by how much it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.pool_spec import KvType, PoolSpec
from gpumesh.pools.base import HostOffer, MemberPlan, ModelShape
from gpumesh.pools.planning.memory import MIB, QUANTISED_KV_BLOCK, can_quantise_cache
from gpumesh.pools.planning.split import Split

MOST_STREAMS = 256  # LLAMA_MAX_SEQ in llama.cpp's src/llama-cparams.h


def head_problems(spec: PoolSpec, offers: Sequence[HostOffer]) -> Iterator[str]:
    head = next((offer for offer in offers if offer.node == spec.head), None)
    if head is None:
        yield f"Nothing is known of the head, {spec.head}."
    elif head.problem is not None:
        yield describe_problem(head)


def model_problems(spec: PoolSpec, shape: ModelShape, draft: ModelShape | None) -> Iterator[str]:
    yield from (f"The model cannot be run: {obstacle}." for obstacle in shape.obstacles)
    if draft is not None:
        yield from (f"The draft model cannot be run: {obstacle}." for obstacle in draft.obstacles)
    if spec.parallel > MOST_STREAMS:
        yield f"parallel: {spec.parallel} is more than the {MOST_STREAMS} streams that llama-server can have."
    if spec.kv_type is not KvType.F16 and not can_quantise_cache(shape):
        head_size = f"heads of {shape.head_size} numbers, no multiple of {QUANTISED_KV_BLOCK}"
        yield f"kv_type: {spec.kv_type} is not possible with this model: it has {head_size}."


def memory_problems(
    spec: PoolSpec, split: Split, members: Sequence[MemberPlan], offers: Sequence[HostOffer]
) -> Iterator[str]:
    if split.fits:
        return
    if spec.split is not None:
        yield from _problems_of_written_split(members)
    else:
        yield f"The model does not fit: {_mib(split.missing_bytes)} are missing."
    for offer in offers:
        if offer.problem is not None and offer.node != spec.head:
            yield describe_problem(offer)


def _problems_of_written_split(members: Sequence[MemberPlan]) -> Iterator[str]:
    is_complete = True
    for member in members:
        for share in member.shares:
            if share.layers and share.needed_bytes > share.offered_bytes:
                is_complete = False
                missing = share.needed_bytes - share.offered_bytes
                yield (
                    f"The layers that split: gives {member.node} need {_mib(share.needed_bytes)} of its "
                    f"{share.device.name}, which can give {_mib(share.offered_bytes)}: {_mib(missing)} are missing."
                )
    if is_complete:
        yield "split: gives layers to a member that cannot take part."


def describe_problem(offer: HostOffer) -> str:
    reasons = [text.rstrip(".") for text in (offer.problem, offer.hint) if text]
    return f"{offer.node} cannot take part: {'; '.join(reasons)}."


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,} MiB"
