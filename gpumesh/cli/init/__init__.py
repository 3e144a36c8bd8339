"""What `gpumesh init` knows: ssh command lines, what providers print, and the mesh.yaml that is written. Pure."""
