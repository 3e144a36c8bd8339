"""Simulated GPU hosts to develop, demonstrate and test against: a real SSH server, an nvidia-smi and a stand-in for
Ollama, over real sockets. All names show that they are simulated (host names ``sim-…``, versions ``…-lab``). This room
runs no inference and no shell. Only the demo, the benchmarks and the tests may import it."""
