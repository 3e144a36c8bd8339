"""Makes the balancer of each policy. The only file that knows which code decides for which policy.

The rest of the simulator sees only ``requests.Decisions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from gpumesh.bench.simulate.reference import ReferenceDecisions
from gpumesh.bench.simulate.requests import Decisions
from gpumesh.bench.simulate.scheduler_decisions import SchedulerDecisions
from gpumesh.bench.simulate.servers.server import SimulatedServer
from gpumesh.errors import UsageError
from gpumesh.topology import PolicyKind

REFERENCE = "reference"
POLICY_NAMES = (*(kind.value for kind in PolicyKind), REFERENCE)


def make_decisions(policy: str, servers: Sequence[SimulatedServer], *, rng: Random, max_queue: int) -> Decisions:
    """The balancer for a policy of ``POLICY_NAMES``. It sees the servers' specs as mesh.yaml would tell them; only the
    reference policy looks at the servers themselves. Raises UsageError for another name."""
    if policy == REFERENCE:
        return ReferenceDecisions(servers)
    try:
        kind = PolicyKind(policy)
    except ValueError:
        raise UsageError(f"--policy {policy!r} is none of: {', '.join(POLICY_NAMES)}") from None
    return SchedulerDecisions([server.spec for server in servers], kind, rng=rng, max_queue=max_queue)
