"""What the mesh's own process sets for itself: its event loop, its memory, how many files it may have open."""
