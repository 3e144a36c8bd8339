"""Settings of the mesh's own process: its event loop, its memory, and how many files it may have open."""
