"""The shell of a session that runs one command line after another on a host.

A session begins with the account's login shell, which may need seconds or minutes before it runs our command: it reads
``.bashrc`` (conda, pyenv), or its home folder is on a slow network disk. In this session only the first command line
waits for the login shell. All others begin at once.

The session's command is ``SHELL_COMMAND``. It prints ``READY_LINE`` when it can take a command line, which we then
write to its input:

- A command line is run in the background. Its output comes as it is written. The command line itself has to print when
  it has ended.
- ``END_LINE``, after the end of the command line, lets the shell collect the ended process. It prints ``READY_LINE``.
- ``KILL_LINE`` kills the command line and the processes that it started. ``READY_LINE`` comes when they have ended. A
  process that waits for broken hardware may never end: then nothing comes, and the session is of no more use.

Nothing may be written before the first ``READY_LINE``: a login shell may read the input too. The session's end, also
the end of the connection or of our process, kills the command line that runs then.
"""

from __future__ import annotations

READY_LINE = b"@gpumesh@ ready"
END_LINE = b"\n"
KILL_LINE = b"kill\n"

# In the script, fd 3 is the session's input, g setsid or empty, p the pid of the command line that runs, c a line of
# the input, k kills what p and g say (as in remote_command.py). The script has no single quote and no line break,
# because csh takes no line break inside quotes. ``$!`` stands before a blank: csh takes any other character after an
# exclamation mark for a reference to its history.
_SCRIPT = (
    "exec 3<&0 </dev/null; g=$(command -v setsid); p=; "
    "k() { kill -9 -$p || { kill -STOP $p; pkill -9 -P $p; kill -9 $p; }; }; "
    f'echo "{READY_LINE.decode()}"; '
    "while read -r c <&3; do case $c in "
    "kill) k >/dev/null 2>&1;; "
    '?*) $g sh -c "$c" 3<&- & p=$! ; continue;; '
    f'esac; wait $p; p=; echo "{READY_LINE.decode()}"; done; '
    '[ -z "$p" ] || k >/dev/null 2>&1'
)
SHELL_COMMAND = f"exec sh -c '{_SCRIPT}'"


def is_shell_script(script: str) -> bool:
    """Whether ``script``, an argument of ``sh -c``, is the script of ``SHELL_COMMAND``."""
    return script == _SCRIPT
