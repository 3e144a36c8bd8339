"""One node of a running mesh: its tunnel, its probes, its ledger, its snapshots; and the fleet of all nodes."""
