"""The fleet's models: what is where, what fits, and the operations on model stores over one node or several.

The gateway renders these operations as Ollama's HTTP answers, the command line as bars and messages. Neither HTTP
servers nor terminals are known here.
"""
