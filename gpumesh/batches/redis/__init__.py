"""The batch store in Redis: ``RedisBatchStore``.

What a call does is in the Lua files of ``lua/``, so that Redis does it in one step. The Python files here turn values
into arguments, and answers into values.
"""
