"""`gpumesh run -f`: a file of prompts in, a file of results out, and neither of them held in memory.

``prompt_file.py`` checks and reads the prompts, ``result_file.py`` writes the results and goes on with those of an
earlier run, ``send_file.py`` sends one after the other.
"""
