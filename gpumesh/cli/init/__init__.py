"""The parts of `gpumesh init`: which hosts a person names, what is found there, and the mesh.yaml that is written."""
