"""Expected against found: rules that turn specs and states into findings. Pure; one file for each family of rules.

Each fault has its own finding and only that: a node whose tunnel is down says nothing of its models. What only the
probes can see (a driver's failure, an ERR! in the table) they notice themselves (``NodeState.noticed``), and the rules
take it in; ``catalog`` explains theirs as well.
"""

from gpumesh.audit.catalog import CATALOG, Explanation, explain
from gpumesh.audit.identity import Machine, Proof, find_machines, gpu_groups, identifying_marks
from gpumesh.audit.rules import collect_findings

__all__ = [
    "CATALOG",
    "Explanation",
    "Machine",
    "Proof",
    "collect_findings",
    "explain",
    "find_machines",
    "gpu_groups",
    "identifying_marks",
]
