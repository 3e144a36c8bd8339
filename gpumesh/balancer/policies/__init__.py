"""The policies: each chooses a node for a request, or lets the request wait. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from gpumesh.balancer.policies.adaptive import AdaptivePolicy
from gpumesh.balancer.policies.base import Policy
from gpumesh.balancer.policies.simple import LeastLoaded, PowerOfTwo, RoundRobin
from gpumesh.topology import PolicyKind

POLICIES: Mapping[PolicyKind, Policy] = {
    PolicyKind.ROUND_ROBIN: RoundRobin(),
    PolicyKind.LEAST_LOADED: LeastLoaded(),
    PolicyKind.POWER_OF_TWO: PowerOfTwo(),
    PolicyKind.ADAPTIVE: AdaptivePolicy(),
}
