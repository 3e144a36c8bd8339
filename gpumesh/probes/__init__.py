"""Questions to a node: its GPUs through nvidia-smi, its server through HTTP. Whatever comes back becomes a report;
nothing that a host says or fails to say raises here, and nothing here decides what is done about it."""
