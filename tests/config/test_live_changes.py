"""What a running mesh takes over from a changed file, and what it cannot."""

from __future__ import annotations

from gpumesh.config.changed_file import describe_change
from gpumesh.config.live_changes import LivePlan, plan_live_changes
from tests.config import build

NODE = "nodes: [{name: a, backend: {port: 1}, ssh: {host: h}}]\n"


def plan(before: str, after: str) -> LivePlan:
    return plan_live_changes(build.topology(before + NODE), build.topology(after + NODE))


def test_the_address_and_redis_stay_as_they_are() -> None:
    found = plan(
        "gateway: {listen: '127.0.0.1:1', policy: round-robin}\n",
        "gateway: {listen: 'unix:/s', max_queue: 5}\nredis: {url: 'redis://localhost'}\n",
    )
    gateway = found.topology.gateway
    assert (gateway.host, gateway.port, gateway.socket, found.topology.redis) == ("127.0.0.1", 1, None, None)
    assert [change.key for change in found.differences.mesh_keys] == ["gateway.policy", "gateway.max_queue"]
    assert [change.key for change in found.after_restart] == ["gateway.listen", "redis"]


def test_a_gateway_that_others_can_reach_never_loses_its_keys() -> None:
    """The file is right, but it says another address, which the running gateway cannot take over."""
    open_to_all = "gateway: {listen: '0.0.0.0:1', api_key_env: KEY}\n"
    found = plan(open_to_all, "gateway: {listen: '127.0.0.1:1', timeout: 5s}\n")
    assert found.topology.gateway.api_key_env == "KEY"
    assert [change.key for change in found.differences.mesh_keys] == ["gateway.timeout"]
    assert {change.key for change in found.after_restart} == {"gateway.listen", "gateway.api_key_env"}
    found = plan(open_to_all, "gateway: {listen: '0.0.0.0:1', api_key_env: OTHER}\n")
    assert found.topology.gateway.api_key_env == "OTHER"
    found = plan("gateway: {api_key_env: KEY}\n", "gateway: {}\n")
    assert found.topology.gateway.api_key_env is None, "on loopback no key is needed"


def test_the_finding_says_how_a_change_takes_effect() -> None:
    def hint(before: str, after: str) -> str:
        finding = describe_change(build.topology(before + NODE), build.topology(after + NODE))
        assert finding is not None
        return finding.hint or ""

    manual, moved = "gateway: {reload: manual}\n", "gateway: {reload: manual, listen: '127.0.0.1:1'}\n"
    assert "within a few seconds" in hint("", "name: other\n")
    assert hint(manual, f"name: other\n{manual}") == "`gpumesh reload` lets the running mesh take it over"
    assert hint(manual, moved) == "gateway.listen only after a restart: `gpumesh down`, then `gpumesh up -d`"
    both = hint(manual, f"name: other\n{moved}")
    assert "`gpumesh reload`" in both
    assert "gateway.listen only after a restart" in both
