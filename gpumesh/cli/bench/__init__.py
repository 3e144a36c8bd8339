"""The parts of `gpumesh bench`: the reading of its options, and the run of a benchmark on the mesh of a Session."""
