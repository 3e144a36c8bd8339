"""Edits of mesh.yaml that leave every other byte as it was: single values, and whole nodes."""
