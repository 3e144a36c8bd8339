"""Tells which nodes have the beginning of a prompt in their cache, so that they need not read it again. Pure.

A prompt is cut into blocks, and each block is known only by a hash (``prints.py``). ``PrefixIndex`` (``index.py``)
holds for every node the prompts that its server is believed to have in its cache. Not allowed here: I/O, a clock, the
text of a prompt, and imports of the balancer's other files: ``balancer/base.py`` needs this room.
"""

from gpumesh.balancer.prefixes.index import PrefixIndex
from gpumesh.balancer.prefixes.prints import PromptHasher, PromptPrint
from gpumesh.balancer.prefixes.shared_prints import SharedPromptHasher

__all__ = ["PrefixIndex", "PromptHasher", "PromptPrint", "SharedPromptHasher"]
