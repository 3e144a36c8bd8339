"""The simulator: the balancer's own code against simulated servers, by discrete events, without sleeping or asyncio.

``fleet_file`` and ``workloads`` say what is simulated. ``simulation`` is the loop over the events: it asks the balancer
(through ``decisions``) for a node, and the node's server (``servers/``) for the time of its next event. ``measures``
collects the figures, ``report`` writes them. ``reference`` is a policy that knows what no gateway can know.

All times are seconds of the simulated clock, which starts at 0. Nothing here reads a clock, uses a network, or sleeps;
the only randomness is a ``Random`` with a seed. Not allowed here: rich, typer, the mesh, the gateway.
"""
