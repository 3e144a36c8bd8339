"""Reads the options of `bench run` that only one scenario has: those of ``overhead`` and ``failover``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.bench.failover.outage_plan import OutagePlan
    from gpumesh.bench.workload.settings import Scenario


def parse_direct_urls(texts: Sequence[str]) -> Mapping[str, str]:
    """The URLs of ``--direct NODE=URL``, by the node's name. Raises UsageError for any other text."""
    urls: dict[str, str] = {}
    for text in texts:
        node, _, url = text.partition("=")
        if not node or not url.startswith(("http://", "https://")):
            raise UsageError(f"--direct {text!r} is not NODE=URL", hint="e.g. --direct iceland=http://10.0.0.5:11434")
        urls[node] = url.rstrip("/")
    return urls


def parse_outage(by: str | None, on: str | None, stop_command: str | None, start_command: str | None) -> OutagePlan:
    """What ``--by``, ``--on`` and the two commands ask for. Raises UsageError for options that do not fit together."""
    from gpumesh.bench.failover.outage_plan import OutagePlan
    from gpumesh.mesh.outages.outage import OutageKind

    try:
        kind = None if by is None else OutageKind(by)
    except ValueError:
        raise UsageError(f"--by {by!r} is none of: tunnel, server, drain") from None
    plan = OutagePlan(kind, on, stop_command, start_command)
    plan.check()
    return plan


def check_scenario(scenario: Scenario, *, direct_urls: Mapping[str, str], outage: OutagePlan) -> None:
    """Raises UsageError if an option was given that this scenario does not have."""
    from gpumesh.bench.failover.outage_plan import OutagePlan

    if direct_urls and scenario != "overhead":
        raise UsageError(f"--direct is for --scenario overhead, not for {scenario}")
    if outage != OutagePlan() and scenario != "failover":
        raise UsageError(f"--by and --on are for --scenario failover, not for {scenario}")
