"""Several gateways over the same GPUs: each tells the others what it has in flight, so that two of them do not pile
onto one node while another idles (DESIGN section 6). Without Redis, or while it is away, each goes on alone.

Only counts travel: no prompt, no model, no address. What is heard from others is hostile until parsed.
"""
