"""`gpumesh batch`: reads the lines of a submitted file, finds the batch that is meant, and writes results to a file.

What is stored and worked on is below, in ``gpumesh/batches``; what is drawn is in ``views/batch``.
"""
