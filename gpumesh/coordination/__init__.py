"""Coordination over Redis of several gateways that use the same GPUs: each tells the others its requests in flight.

So two gateways do not send their requests to one node while another node idles. Without Redis, or while Redis is away,
each gateway works alone.

Gateways publish counts only: no prompt, no model, no address. Redis stores nothing. A message of another gateway is
hostile until parsed.
"""
