"""``Work``: the tokens that a request is expected to take. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from gpumesh.balancer.fairness.client_counters import weighted_tokens

NOTHING_CACHED: Mapping[str, float] = MappingProxyType({})


class Work(msgspec.Struct, frozen=True):
    """The expected work of a request: tokens of its prompt and of its answer. ``cached``: for each node, how many
    tokens of the prompt its server is believed to have in its cache; nodes with none are left out."""

    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    cached: Mapping[str, float] = NOTHING_CACHED

    @property
    def cost(self) -> float:
        """What the client is charged before the true cost is known, in weighted tokens."""
        return weighted_tokens(self.prompt_tokens, self.answer_tokens)
