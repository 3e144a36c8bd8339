"""The plan of a pool: the one entry to this room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpumesh.pool_spec import PoolSpec
from gpumesh.pools.base import HostOffer, ModelShape, PoolPlan, WorkerPath


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
    raise NotImplementedError
