"""A simulated inference server: ``server`` loads and evicts models, ``runner`` is a model in memory with its slots and
their prompts, ``gpu`` reads and generates, ``prefix_cache`` is a cache of prompts that all slots share.

A server has no clock: its caller says what time it is, and asks when something will happen next.
"""
