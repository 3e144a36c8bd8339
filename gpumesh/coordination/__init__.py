"""Several gateways over the same GPUs: each publishes what it has in flight, so that two gateways do not send their
requests to one node while another node idles. Without Redis, or while Redis is away, each gateway goes on alone.

Only counts are published: no prompt, no model, no address. Nothing is stored. Messages of others are hostile until
parsed.
"""
