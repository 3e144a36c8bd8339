"""Tells people and programs what has happened in the mesh: the section `notify` of mesh.yaml."""
