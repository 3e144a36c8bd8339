"""Settings of the mesh's own process: its event loop (uvloop), its memory (glibc), its limit of open files."""
