"""OpenAI's ``/v1/files`` and ``/v1/batches`` over a batch store, and ``GatewaySender``, which sends a batch's requests.

A key sees what was made with it, and nothing else.
"""
