"""Coordination of several gateways that use the same GPUs, over a Redis that they share.

They share the places on the nodes, so that no request waits inside a server, and a freed place goes to the best waiting
request of all gateways. They also tell each other facts and messages. Without Redis, or while Redis is away, each
gateway works alone.

The script in ``lua/`` decides. What it stores expires: counts, costs, hashes of clients' names, facts; no prompt and no
answer. What comes from Redis or from another gateway is hostile until parsed.
"""
