"""A mesh without ``redis`` in mesh.yaml: its coordination does nothing."""

from __future__ import annotations

from gpumesh.coordination.factory import create_coordination
from gpumesh.coordination.several_gateways import SeveralGateways
from gpumesh.coordination.single_gateway import SingleGateway
from gpumesh.topology import RedisSpec


async def test_there_are_no_others_and_nothing_runs() -> None:
    coordination = create_coordination(None, mesh="mesh", on_change=lambda keys: None, clock=lambda: 0.0)
    assert isinstance(coordination, SingleGateway)
    assert coordination.take_now("GPU-1")
    assert coordination.others_in_flight("GPU-1", own=3, limit=4) == 0
    assert coordination.findings() == ()
    await coordination.run()
    assert repr(coordination) == "<SingleGateway>"


async def test_with_redis_it_is_alone_until_it_is_connected() -> None:
    spec = RedisSpec("unix:///nowhere/redis.sock")
    coordination = create_coordination(spec, mesh="mesh", on_change=lambda keys: None, clock=lambda: 0.0)
    assert isinstance(coordination, SeveralGateways)
    assert coordination.findings() == ()
    assert coordination.take_now("GPU-1")
    coordination.problem = "no connection"
    [finding] = coordination.findings()
    assert finding.code == "redis-away"
    assert finding.message.endswith("Redis: no connection")
