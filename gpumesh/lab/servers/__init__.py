"""The parts of the simulated inference servers: an HTTP server with adjustable faults; routes and frames per API."""
