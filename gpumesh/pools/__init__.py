"""Pools: one model over the GPUs of several nodes, by llama.cpp's RPC. docs/internals/pools.md has how that behaves.

``planning`` decides purely, ``gguf`` reads a model's header, ``hosts`` finds out and starts things on a host,
``running`` keeps a pool alive. A pool that runs is one more node of the mesh, of kind llamacpp.
"""
