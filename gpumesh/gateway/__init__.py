"""The one endpoint: an HTTP server over a mesh, with the APIs that clients already use (Ollama, OpenAI, Anthropic).

The gateway does not decide which node answers: the mesh does.
"""
