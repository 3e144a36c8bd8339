"""Transport ``openssh``: connections that the system's ``ssh`` holds, as a child process of the worker.

ssh supports features that paramiko lacks: ProxyCommand, Match, FIDO keys, certificates, IdentityAgent. connection.py
describes how this transport works. options.py has the command lines, master.py the process, login.py the login.
"""
