"""Text as values: addresses, lines, names of models, versions, sentences. How foreign text becomes harmless. Pure."""
