"""The options that people guess, and the sentence that answers each."""

from __future__ import annotations

from collections.abc import Mapping

_SSH = "`gpumesh ssh NODE -- CMD` gives a command a terminal; exec needs no -i and no -t"
_ALL_NODES = "`gpumesh status` shows all nodes by itself"
_FROM_START = "the log keeps what earlier runs wrote: `gpumesh logs -n 1000`, `gpumesh logs --since 1d`"
_TO_HOST = (
    "options of CMD stand behind --: `gpumesh ssh NODE -- CMD`; user, port, key and jump host are in mesh.yaml:"
    " `gpumesh node edit NODE`"
)
_CHAT = "a conversation is `gpumesh chat MODEL`; `gpumesh run MODEL PROMPT` answers once"
_UP = "nothing is built here: `gpumesh up -d` starts the mesh and returns when it serves"
_POOL_UP = "a pool runs in the mesh, in the background: `gpumesh pool up NAME` returns when it is ready"
_POOL_WATCH = "`gpumesh status -w` stays and shows the pool as a node; `gpumesh pool status` shows it once"
_BATCH_FILE = "the file needs no option: `gpumesh batch submit FILE`, or - for standard input"
_BATCH_WATCH = "`gpumesh batch show --watch` stays until it has ended; `gpumesh batch results --follow` prints results"
_BATCH_FOLLOW = "`gpumesh batch results --follow` stays until it has ended; `gpumesh batch show --watch` shows progress"
_COMPLETION = "the shell's name needs no option: `gpumesh completion bash`"
_VERSION = "`gpumesh version` tells the version, and `gpumesh doctor` all the others"
_SHOW_MODEL = "`gpumesh models list -o wide` shows what is known of the models"

# By command ("" is `gpumesh` itself) and option. ``*``: any option that the command does not know.
OPTION_POINTERS: Mapping[tuple[str, str], str] = {
    **dict.fromkeys([("exec", name) for name in ("-i", "-t", "--tty", "--stdin", "--interactive")], _SSH),
    **dict.fromkeys([("status", name) for name in ("-A", "-a", "--all", "--all-namespaces")], _ALL_NODES),
    **dict.fromkeys([("status", name) for name in ("-f", "--follow")], "`gpumesh status -w` stays and shows changes"),
    **dict.fromkeys([("pool up", name) for name in ("-d", "--detach", "--background")], _POOL_UP),
    **dict.fromkeys([("pool status", name) for name in ("-w", "--watch", "-f", "--follow")], _POOL_WATCH),
    **dict.fromkeys([("batch submit", name) for name in ("-f", "--file")], _BATCH_FILE),
    **dict.fromkeys([("batch show", name) for name in ("-f", "--follow")], _BATCH_WATCH),
    **dict.fromkeys([("batch results", name) for name in ("-w", "--watch")], _BATCH_FOLLOW),
    ("status", "--no-stream"): "`gpumesh status` shows the state once",
    **dict.fromkeys([("logs", name) for name in ("-p", "--previous", "-t", "--timestamps")], _FROM_START),
    **dict.fromkeys([("logs", name) for name in ("-w", "--watch")], "`gpumesh logs -f` stays and shows what comes"),
    **dict.fromkeys([("run", name) for name in ("-i", "-t", "--rm", "--interactive")], _CHAT),
    **dict.fromkeys([("up", name) for name in ("--build", "--wait", "--force-recreate", "--pull")], _UP),
    **dict.fromkeys([("completion", name) for name in ("-s", "--shell")], _COMPLETION),
    **dict.fromkeys([("version", name) for name in ("--client", "--short")], _VERSION),
    **dict.fromkeys([("models list", name) for name in ("--modelfile", "--parameters", "--template")], _SHOW_MODEL),
    ("", "*"): "options stand behind the command, as in `gpumesh status --json`; `gpumesh help` lists the commands",
    ("ssh", "*"): _TO_HOST,
    ("drain", "*"): "`gpumesh drain NODE` needs no option: what runs there ends by itself",
    ("down", "*"): "`gpumesh down` leaves nothing behind; `gpumesh down --wait 0` does not wait for requests",
}
