from __future__ import annotations

import pytest

from gpumesh.balancer.outcomes import Outcome
from gpumesh.mesh.request_counters import RequestCounters


@pytest.mark.parametrize("outcome", Outcome)
def test_each_request_ends_once(outcome: Outcome) -> None:
    counters = RequestCounters(accepted=2)
    counters.count_end(outcome)
    assert counters.in_flight == 1
    assert (counters.served, counters.failed, counters.cancelled) == (
        int(outcome in (Outcome.SERVED, Outcome.CLIENT_ERROR)),
        int(outcome not in (Outcome.SERVED, Outcome.CLIENT_ERROR, Outcome.CLIENT_GONE)),
        int(outcome is Outcome.CLIENT_GONE),
    )
