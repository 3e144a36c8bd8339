"""The operations of a mesh (``Session``), and the Session over a mesh in this process (``LocalSession``).

``prompt_sender.py`` sends prompts through any Session. The Session over the control socket is in ``control_socket/``.
"""
