"""Who has used what: requests, tokens, GPU seconds and energy by key, model, node and day, kept in SQLite.

``recorder`` counts each request at its end, ``store`` writes the counts, ``report`` reads them, also without a mesh.

Not allowed here: prompts, answers, secrets of keys, and decisions about requests (``access/quotas.py`` decides).
"""
