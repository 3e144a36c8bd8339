"""Simulated GPU hosts to develop, demonstrate and test against: a real SSH server, an nvidia-smi and a stand-in for
Ollama, over real sockets. Everything says that it is simulated (host names ``sim-…``, versions ``…-lab``). No
inference and no shell happen here, and nothing but the demo, the benchmarks and the tests may import this room."""
