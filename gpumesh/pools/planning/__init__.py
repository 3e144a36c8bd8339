"""Which node holds which layers of a pool's model, whether that fits, and how fast it will be. Pure: no I/O, no clock."""
