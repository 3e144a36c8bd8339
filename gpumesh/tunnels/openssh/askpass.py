"""The program that ``ssh`` runs to ask for a password or a passphrase (``SSH_ASKPASS``).

It passes the question to the tunnel's worker process over a Unix socket (0600, in a 0700 folder) and prints the answer
for ssh. So no argument and no environment variable ever holds a secret. Exit status 1: there is no answer. It never
writes to stderr, which is also ssh's, because what stands there counts as the host's text.
"""

from __future__ import annotations

import json
import socket
import sys


def main(path: str, question: str) -> int:
    """Asks ``question`` at ``path``, the Unix socket of ``prompts.AskpassServer``, and prints the answer.

    Returns the exit status: 0, or 1 when there is no answer.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.connect(path)
            server.sendall(json.dumps(question).encode() + b"\n")
            with server.makefile("rb") as answers:
                line = answers.readline()
    except OSError:  # the worker has given the login up
        return 1
    # A line without its end: the worker ended, or closed the connection, before it had answered.
    answer = json.loads(line) if line.endswith(b"\n") else None
    if not isinstance(answer, str):
        return 1
    sys.stdout.write(answer + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
