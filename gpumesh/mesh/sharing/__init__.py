"""What a mesh shares with the other gateways of its nodes, besides places: failures, drains, and what was learned.

``coordination/facts`` has the messages and decides when they are sent. Here they become changes of nodes.
"""
