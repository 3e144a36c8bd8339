"""How many requests of a model a node runs at once: found fast, from first tokens and durations. Pure.

``NodeSlots`` (``node_slots.py``) is what the balancer uses: it follows a node's requests. ``ParallelLimit``
(``parallel_limit.py``) is what is known of one model, with the rules for what each sign means.
"""

from gpumesh.balancer.limits.node_slots import NodeSlots, SentRequest
from gpumesh.balancer.limits.parallel_limit import ParallelLimit, SlotSearch, learn_limit

__all__ = ["NodeSlots", "ParallelLimit", "SentRequest", "SlotSearch", "learn_limit"]
