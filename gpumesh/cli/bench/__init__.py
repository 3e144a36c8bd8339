"""The parts of `gpumesh bench`: it reads the options, and runs a benchmark on the mesh of a Session."""
