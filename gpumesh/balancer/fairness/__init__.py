"""The parts of ``FairQueue``: the order within a class and a group, the clients' counters, the usual waits. Pure."""
