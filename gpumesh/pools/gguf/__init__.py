"""The header of a GGUF file, read from bytes: what the model is made of. Pure; the bytes are hostile until parsed."""
