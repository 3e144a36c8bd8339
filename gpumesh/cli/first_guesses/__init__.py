"""What people type first who know kubectl, ollama, docker, ssh or gh, and what answers it.

A guess either runs the command that is meant, under its own name, or is answered with one sentence that names that
command (exit code 2). ``words.py`` has the words, ``options.py`` the options, and ``answers.py`` decides. None of this
is listed by `--help` or completed, and none of it is imported before a guess is made: see ``command_group.py``.
"""
