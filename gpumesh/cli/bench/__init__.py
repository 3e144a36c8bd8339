"""The parts of `gpumesh bench`: its options read, and a benchmark run on the mesh of a Session."""
