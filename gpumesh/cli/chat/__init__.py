"""`gpumesh chat`: a conversation with a model at the terminal, over any Session.

``chat_loop.py`` reads lines and sends messages, ``slash_commands.py`` has the commands that begin with ``/``,
``conversation.py`` what was said. Only ``line_editor.py`` and ``completer.py`` know prompt_toolkit.
"""
