"""What `gpumesh logs` shows: which lines of the log are chosen, and how a line looks."""
