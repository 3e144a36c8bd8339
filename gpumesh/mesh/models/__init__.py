"""The fleet's models: the nodes that have them, the sizes that fit, and operations on the model stores of nodes.

The gateway renders these operations as Ollama's HTTP answers, the command line as bars and messages. The code here
knows neither HTTP servers nor terminals.
"""
