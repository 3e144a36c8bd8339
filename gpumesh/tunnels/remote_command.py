"""Wraps a command for a host, so that the command and all that it started end when the session's input ends.

Closing the session is not enough: sshd lets a command without a terminal run on when its client goes away. A request to
sshd to kill the command fails for a login of root, as on every rented pod (``session signalling requires privilege
separation``). So the command runs under a POSIX shell that waits for the end of its input. That end comes when the
client closes the session, when the connection breaks, and when our process dies.
"""

from __future__ import annotations

import re
import shlex

SHELL_TEST_OUTPUT = b"gpumesh"
SHELL_TEST = f"exec sh -c 'echo {SHELL_TEST_OUTPUT.decode()}'"
"""Prints ``SHELL_TEST_OUTPUT`` where the login shell, even csh or fish, can start a POSIX shell."""

# The command gets its own process group where the host has ``setsid``. Elsewhere ``pkill`` finds its children.
_BEFORE = "exec 3<&0; g=$(command -v setsid); (exec $g "
_AFTER = (
    ") </dev/null 3<&- & p=$!; "
    "(cat <&3 >/dev/null 2>&1; kill -9 -$p || { kill -STOP $p; pkill -9 -P $p; kill -9 $p; }) >/dev/null 2>&1 & w=$!; "
    "exec 3<&-; wait $p; s=$?; kill $w 2>/dev/null; exit $s"
)
_WRAPPED = re.compile(re.escape(_BEFORE) + "(.*)" + re.escape(_AFTER), re.DOTALL)


def wrap_killable(command: str) -> str:
    """``command`` (an argument list quoted for a POSIX shell) as a command line that ends with its session's input.

    The command's exit status is passed on; a signal that ends it shows as 128 plus its number.
    """
    return f"exec sh -c {shlex.quote(_BEFORE + command + _AFTER)}"


def unwrap_killable(script: str) -> str | None:
    """The command inside the script that ``wrap_killable`` gives to ``sh -c``; ``None`` for any other script."""
    match = _WRAPPED.fullmatch(script)
    return match[1] if match else None
