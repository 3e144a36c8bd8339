"""What inference servers speak: requests, frames, errors, continuation. Bytes in, values out; no I/O here."""
