"""A command line for a host that ends the command, and all it started, when the input of its session ends.

Closing a session does not: sshd leaves a command without a terminal running when its client goes. Asking sshd to kill
it does not either where the login is root's, as on every rented pod (``session signalling requires privilege
separation``). So the command runs under a POSIX shell that waits for the end of its input, which comes when the client
closes the session, when the connection breaks, and when our process dies.
"""

from __future__ import annotations

import re
import shlex

SHELL_TEST_OUTPUT = b"gpumesh"
SHELL_TEST = f"exec sh -c 'echo {SHELL_TEST_OUTPUT.decode()}'"
"""Prints ``SHELL_TEST_OUTPUT`` where the login shell can start a POSIX shell, whatever it is itself (csh, fish)."""

# In a process group of its own, where the host has ``setsid``; else its children are looked for.
_BEFORE = "exec 3<&0; g=$(command -v setsid); (exec $g "
_AFTER = (
    ") </dev/null 3<&- & p=$!; "
    "(cat <&3 >/dev/null 2>&1; kill -9 -$p || { kill -STOP $p; pkill -9 -P $p; kill -9 $p; }) >/dev/null 2>&1 & w=$!; "
    "exec 3<&-; wait $p; s=$?; kill $w 2>/dev/null; exit $s"
)
_WATCHED = re.compile(re.escape(_BEFORE) + "(.*)" + re.escape(_AFTER), re.DOTALL)


def wrap_killable(command: str) -> str:
    """``command`` (words quoted for a POSIX shell, no more) so that it ends with its session's input. Its exit status
    is passed on; a signal that ends it shows as 128 and its number."""
    return f"exec sh -c {shlex.quote(_BEFORE + command + _AFTER)}"


def unwrap_killable(script: str) -> str | None:
    """The command inside the script that ``wrap_killable`` gives to ``sh -c``; ``None`` for any other script."""
    match = _WATCHED.fullmatch(script)
    return match[1] if match else None
