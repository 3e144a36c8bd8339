"""The operations of a mesh (``Session``: status, chat, exec, drain …), here over a mesh in this process.

``prompt_sender.py`` sends prompts through any Session; ``prompt_window.py`` sends any number of them with bounded
memory. The Session over the control socket is in ``control_socket/``.
"""
