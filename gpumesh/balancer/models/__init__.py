"""What the balancer knows of models: where each is in memory, what a load depends on, what mesh.yaml asks. Pure."""
