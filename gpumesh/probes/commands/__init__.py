"""Runs the probes' commands on a host, one script at a time, and tells what the host waits for. What the commands are
and what their outputs mean does not enter."""
