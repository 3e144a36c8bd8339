"""The commands, one file for each: the command's options, what it does with a Session, and its exit codes.

``cli/views`` draws the output. Code that another program could use too belongs to the rooms below ``cli``.
"""
