"""What a host or a client may send, mutated: ``cases`` are values, ``mutators`` make new ones out of good ones,
``parsers`` and ``wire`` feed them to the code. `benchmarks/fuzz.py` looks for new faults with it; ``corpus/`` holds
what was found, replayed by each `make test`.
"""
