"""The fleet's models: which node has which, which sizes fit, and the operations on model stores of one node or several.

The gateway renders these operations as Ollama's HTTP answers, the command line as bars and messages. The code here
knows neither HTTP servers nor terminals.
"""
