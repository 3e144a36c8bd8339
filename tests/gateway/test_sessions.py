"""``X-GPUMesh-Session`` keeps a conversation on its node, whatever the policy, from its first short turn on."""

from __future__ import annotations

import pytest

from gpumesh.topology import GatewaySpec, PolicyKind
from tests.gateway.fleet import serve_hosts


@pytest.mark.parametrize("policy", list(PolicyKind))
async def test_a_named_conversation_has_one_node(policy: PolicyKind) -> None:
    async with serve_hosts(spec=GatewaySpec(policy=policy), max_parallel=4) as fleet:
        nodes: dict[str, set[str]] = {"one": set(), "two": set(), "three": set(), "four": set()}
        for _ in range(3):
            for session, seen in nodes.items():
                answer = await fleet.chat("and?", headers={"X-GPUMesh-Session": session})
                seen.add(answer.headers["X-GPUMesh-Node"])
        assert [len(seen) for seen in nodes.values()] == [1, 1, 1, 1]
        if policy is PolicyKind.ROUND_ROBIN:
            assert len(set.union(*nodes.values())) == 2, "the conversations are spread"
