"""Pools with real parts: two hosts behind OpenSSH's sshd, each with llama.cpp's programs on its PATH and without a GPU,
a model on the first one, and the installed command."""
