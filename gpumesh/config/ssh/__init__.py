"""Reads the user's ``~/.ssh/config`` and key files, as far as mesh.yaml refers to them. No connection is made here."""
