"""Computes figures from records: of a stage (``summary``), of the GPUs, and figures that compare stages."""
