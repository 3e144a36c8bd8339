"""Settings of the mesh's process: event loop (uvloop), memory (glibc), garbage collection, the limit of open files."""
