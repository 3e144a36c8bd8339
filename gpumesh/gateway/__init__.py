"""The one endpoint: an HTTP server over a mesh, with the APIs that clients already use (Ollama, OpenAI, Anthropic).

Which node answers is not decided here.
"""
