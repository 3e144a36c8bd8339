"""What limited a stage, if not the servers: measures the processes and the machine, and judges by it."""
