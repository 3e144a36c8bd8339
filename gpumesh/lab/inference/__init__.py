"""The inference of a simulated host in time: models in memory, slots, prefill, tokens, GPU load. No text, no HTTP.

It behaves as Ollama and llama-server do (``docs/internals/ollama.md``)."""
