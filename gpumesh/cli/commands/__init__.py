"""One file for each command: its options, what it does with a Session, its exit codes.

What is drawn is in ``cli/views``; what another program could want is below ``cli``.
"""
