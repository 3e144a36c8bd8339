"""The parts of the stand-ins for inference servers: a server with adjustable faults, and the routes of each API."""
