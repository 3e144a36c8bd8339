"""The parts of `gpumesh init`: the hosts that a person names, the probe of these hosts, and the text of mesh.yaml."""
