"""Wraps a command for a host, so that the command and all processes that it started end when the session's input ends.

Closing the session is not enough: sshd lets a command without a terminal run on when its client has gone. We cannot ask
sshd to kill the command either: for a login of root, as on every rented pod, sshd refuses that (``session signalling
requires privilege separation``). So the command runs under a POSIX shell that waits for the end of its input. That end
comes when the client closes the session, when the connection breaks, and when our process dies.
"""

from __future__ import annotations

import re
import shlex

SHELL_TEST_OUTPUT = b"gpumesh"
SHELL_TEST = f"exec sh -c 'echo {SHELL_TEST_OUTPUT.decode()}'"
"""A command that prints ``SHELL_TEST_OUTPUT`` if the login shell, even csh or fish, can start a POSIX shell."""

# The script runs the command in the background and waits for it. A second background shell reads the session's input,
# and kills the command when the input ends. Where the host has ``setsid``, the command gets its own process group,
# which is killed as a whole. Elsewhere ``pkill`` finds the command's children. In the script, g is setsid or empty, p
# the command's pid, w the pid of the second shell, s the exit status.
_SCRIPT_START = "exec 3<&0; g=$(command -v setsid); (exec $g "
_SCRIPT_END = (
    ") </dev/null 3<&- & p=$!; "
    "(cat <&3 >/dev/null 2>&1; kill -9 -$p || { kill -STOP $p; pkill -9 -P $p; kill -9 $p; }) >/dev/null 2>&1 & w=$!; "
    "exec 3<&-; wait $p; s=$?; kill $w 2>/dev/null; exit $s"
)
_SCRIPT = re.compile(re.escape(_SCRIPT_START) + "(.*)" + re.escape(_SCRIPT_END), re.DOTALL)


def wrap_killable(command: str) -> str:
    """Wraps ``command`` (an argument list quoted for a POSIX shell) into a command line that ends with its session's
    input.

    The exit status is that of the command; 128 plus the signal's number when a signal ended the command.
    """
    return f"exec sh -c {shlex.quote(_SCRIPT_START + command + _SCRIPT_END)}"


def unwrap_killable(script: str) -> str | None:
    """Returns the command inside a script that ``wrap_killable`` gave to ``sh -c``; ``None`` for any other script."""
    match = _SCRIPT.fullmatch(script)
    return match[1] if match else None
