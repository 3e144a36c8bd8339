"""One file for each command: its options, what it does with a Session, its exit codes.

``cli/views`` draws the output. Code that another program could use too belongs to the rooms below ``cli``.
"""
