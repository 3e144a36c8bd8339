"""The plan of a pool: the one entry to this room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpumesh.pool_spec import KvType, PoolSpec
from gpumesh.pools.base import HostOffer, ModelShape, PoolPlan, WorkerPath
from gpumesh.pools.planning.advice import advice_if_it_fits, advice_if_too_large
from gpumesh.pools.planning.buffers.compute_buffers import Place, compute_bytes
from gpumesh.pools.planning.choice import choose_split, members_of
from gpumesh.pools.planning.explicit_split import find_split_problem, split_as_written
from gpumesh.pools.planning.hosts import gather_hosts
from gpumesh.pools.planning.memory import Load, shared_bytes
from gpumesh.pools.planning.problems import head_problems, memory_problems, model_problems
from gpumesh.pools.planning.speed import forecast_load, forecast_speed
from gpumesh.pools.planning.split import Model


def plan_pool(
    spec: PoolSpec,
    shape: ModelShape,
    offers: Sequence[HostOffer],
    paths: Mapping[str, WorkerPath],
    *,
    draft: ModelShape | None = None,
) -> PoolPlan:
    """The fastest split of the model over the members that fits, or the problems and what would fit instead.

    ``offers`` has one offer for each node of ``spec.members``. ``paths`` has, by node, the way from the head to each
    other member. ``draft`` is the shape of ``spec.draft``.
    """
    model = Model.of(shape, Load.of(spec))
    draft_bytes = _draft_bytes(spec, draft, offers)
    hosts = gather_hosts(spec, offers, paths, draft_bytes=draft_bytes, unload=spec.unload)
    split_problem = find_split_problem(spec, shape)
    split = choose_split(model, hosts) if spec.split is None or split_problem else split_as_written(spec, model, hosts)
    members = members_of(model, hosts, split, [member.node for member in spec.members])
    problems = [*head_problems(spec, offers), *model_problems(spec, shape, draft)]
    if split_problem:
        problems.append(split_problem)
    too_large = list(memory_problems(spec, split, members, offers))
    plan = PoolPlan(
        pool=spec.name,
        model=spec.model,
        shape=shape,
        members=members,
        context=spec.context,
        parallel=spec.parallel,
        kv_type=spec.kv_type,
        problems=(*problems, *too_large),
        draft=draft,
    )
    if too_large and not problems:
        advice = advice_if_too_large(spec, model, offers, paths, draft_bytes=draft_bytes)
        return replace(plan, advice=tuple(advice))
    if plan.problems:
        return plan
    speed = forecast_speed(shape, members, context=spec.context, parallel=spec.parallel, draft=draft)
    start = forecast_load(shape, members)
    plan = replace(plan, speed=speed, sent_bytes=start.sent_bytes, load_s=start.load_s)
    return replace(plan, advice=tuple(advice_if_it_fits(spec, plan, offers)))


def _draft_bytes(spec: PoolSpec, draft: ModelShape | None, offers: Sequence[HostOffer]) -> int:
    """What a draft model needs on the head. llama-server gives it the same context, and a cache of F16."""
    if draft is None:
        return 0
    model = Model.of(draft, Load(spec.context, spec.parallel, KvType.F16))
    on_gpu = any(device.index is not None for offer in offers if offer.node == spec.head for device in offer.devices)
    place = Place(0, len(model.needs), is_head_cpu=not on_gpu, is_gpu=on_gpu)
    embeddings = 0 if on_gpu else draft.input_bytes - shared_bytes(draft)
    return model.needed_before[-1] + embeddings + compute_bytes(draft, model.load, place)
