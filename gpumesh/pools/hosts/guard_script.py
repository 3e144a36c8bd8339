"""The shell script that guards a program of a pool on its host, so that the program never outlives the pool.

sshd lets a command run on when its client has gone, and it does not notice a connection that drops all packets for
hours. So the program runs under a script that reads heartbeats from the session's input. The script ends the program
and all its children when

- we ask for it (``STOP``);
- the input ends: the session was closed, its connection broke, or our process was killed;
- no heartbeat has come for a while: the connection drops all packets, or our process is stopped;
- the script itself is killed, because sshd then ends the input.

First the program gets SIGTERM, and a few seconds later SIGKILL. When the program ends by itself, what is left of its
children is killed, and the script ends with the program's exit status (128 plus the signal's number after a signal).

The script needs a POSIX shell (dash, bash, busybox), ``sleep`` and ``kill``. ``setsid`` gives the program a process
group of its own; without it, bash does this by job control. Where neither works (dash without ``setsid``), the program
gets SIGKILL at once, and ``pkill`` finds its children; the children of a program that ended by itself are not found
then. The script has no single quote and no line break, because a login shell such as csh takes no line break inside
quotes; ``$!`` stands before a blank for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

HEARTBEAT = b"\n"
STOP = b"stop\n"
HEARTBEAT_INTERVAL_S = 4.0
HEARTBEAT_LIMIT_S = 20.0
KILL_AFTER_S = 3.0
"""The time between SIGTERM and SIGKILL. It is shorter than ``tunnels.base.PROGRAM_END_S``."""
TICKS = 10  # how often the limit's time is looked at during the limit

# The watcher, a process group of its own, so that it lives on when the script that started it is killed. Its arguments
# are the program's pid p, the seconds between two ticks, the number of ticks n without a heartbeat, and the seconds
# between the two signals. The first subshell turns each heartbeat into "b", and STOP and the input's end into "e"; the
# loop after it writes "t" at each tick. The second subshell counts the ticks since the last heartbeat. It ends the
# watcher too.
_WATCHER = (
    'trap "" HUP INT TERM; exec 3<&0 </dev/null; p=$1 t=$2 n=$3 k=$4; '
    '{ (while read -r l <&3; do [ -z "$l" ] || break; echo b; done; echo e) & '
    "exec 3<&-; while sleep $t; do echo t || exit; done; } | "
    "{ exec 3<&-; i=0; while read -r l; do case $l in "
    "b) i=0;; t) i=$((i+1)); [ $i -lt $n ] || break;; *) break;; esac; done; "
    "if kill -TERM -$p; then sleep $k; kill -9 -$p; else kill -STOP $p; pkill -9 -P $p; kill -9 $p; fi; kill -9 -$$; }"
)
# The arguments of the main script are the watcher's script, its last three arguments, and the program's argv. p is the
# program's pid, q the watcher's, s the exit status.
_SCRIPT = (
    "exec 3<&0 </dev/null; w=$1 t=$2 n=$3 k=$4; shift 4; "
    "g=$(command -v setsid) || set -m 2>/dev/null; "
    '(exec $g "$@") 3<&- 2>&1 & p=$! ; '
    '(exec $g sh -c "$w" gpumesh-watcher $p $t $n $k) <&3 3<&- >/dev/null 2>&1 & q=$! ; '
    "exec 3<&-; wait $p; s=$?; "
    "{ kill -9 -$p; kill -9 -$q || kill -9 $q; } 2>/dev/null; exit $s"
)


def guarded_argv(
    argv: Sequence[str], *, limit_s: float = HEARTBEAT_LIMIT_S, kill_after_s: float = KILL_AFTER_S
) -> tuple[str, ...]:
    """The argument list that runs ``argv`` under the guard. Its standard output has both outputs of the program.

    ``limit_s``: the time without a heartbeat after which the program is ended. It is looked at ten times during the
    limit, in whole seconds where that is possible, because POSIX's ``sleep`` takes no other ones.
    """
    tick_s = limit_s / TICKS
    if tick_s >= 1.0:
        tick_s = math.floor(tick_s)
    ticks = math.ceil(limit_s / tick_s)
    return ("sh", "-c", _SCRIPT, "gpumesh-guard", _WATCHER, f"{tick_s:g}", str(ticks), f"{kill_after_s:g}", *argv)
