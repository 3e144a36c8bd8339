"""What the stand-ins for inference servers are made of: a server with set faults, and the routes of each API."""
