"""``SqliteBatchStore``: batches in a SQLite file of the state folder. ``database.py`` opens the file and runs short
transactions; each other file has the statements for a few tables; ``store.py`` puts them together.
"""
