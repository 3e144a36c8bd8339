"""Simulated GPU hosts for demos, benchmarks and tests: a real SSH server, an nvidia-smi, stand-ins for Ollama and vLLM.

All connections use real sockets. All names show that they are simulated (host names ``sim-…``, versions ``…-lab``).
Nothing here runs a model or a real shell. Only the demo, the benchmarks and the tests may import this room."""
