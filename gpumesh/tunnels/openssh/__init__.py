"""Transport ``openssh``: the system's ``ssh`` as a child of the worker.

It supports features that paramiko lacks: ProxyCommand, Match, FIDO keys, certificates, IdentityAgent. connection.py
describes how it works. options.py has the command lines, master.py the process, login.py the login.
"""
