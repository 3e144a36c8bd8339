"""The mesh as a service of the system: units for systemd, an agent for launchd, and the programs that manage them.

``manager_link`` is the mesh's side while it runs; the other files are for `gpumesh service`. Texts for people belong to
cli/.
"""
