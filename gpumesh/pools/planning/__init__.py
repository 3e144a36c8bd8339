"""Which node holds which layers of a pool's model, whether that fits, and how fast it is. Pure: no I/O, no clock."""
