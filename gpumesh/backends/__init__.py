"""The APIs of inference servers: requests, frames, errors, continuation. Bytes in, values out; no I/O here."""
