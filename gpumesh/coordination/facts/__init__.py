"""What gateways tell each other about the mesh, besides their requests in flight. Pure.

Each gateway tells that it lives, which nodes a person has drained at it, which nodes have just failed or come back at
it, what it has learned about servers, and which prompts' hashes lie where. Nothing of this is stored in Redis: a
message reaches the gateways that listen now, and a fact holds as long as its gateway is heard.

A message of another gateway is hostile until parsed (``messages.py``). Not allowed here: sockets and Redis.
"""
