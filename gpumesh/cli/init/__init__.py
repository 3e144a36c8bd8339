"""The parts of `gpumesh init`: reading the hosts that a person names, probing them, and writing mesh.yaml."""
