"""Learns how fast a node serves each model: the rates that a request would have alone on the node. Pure.

``ServiceRates`` (``service_rates.py``) tells how long a request would take. ``rate_fits.py`` fits the rates of one
model to its answers. ``ActivityMeter`` (``activity.py``) measures how many streams ran during an answer.
"""

from gpumesh.balancer.rates.activity import ActivityMeter
from gpumesh.balancer.rates.read_stall import ReadStall
from gpumesh.balancer.rates.service_rates import ServiceRates

__all__ = ["ActivityMeter", "ReadStall", "ServiceRates"]
