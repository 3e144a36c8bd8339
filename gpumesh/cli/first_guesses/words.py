"""The words that people guess, by command: those that run a command of ours, and those that a sentence answers.

The key of a table is the path of a group of commands: ``()`` is `gpumesh` itself, ``("models",)`` is `gpumesh models`.
"""

from __future__ import annotations

from collections.abc import Mapping

# Guesses that run another command, whose words stand on the right. All that follows the guess is kept.
ALIASES: Mapping[tuple[str, ...], Mapping[str, tuple[str, ...]]] = {
    (): {
        # ollama
        "ls": ("models", "list"),
        "list": ("models", "list"),
        "images": ("models", "list"),
        "tags": ("models", "list"),
        "model": ("models",),
        "pull": ("models", "pull"),
        "download": ("models", "pull"),
        "load": ("models", "load"),
        "warm": ("models", "load"),
        "unload": ("models", "unload"),
        "sync": ("models", "sync"),
        "pools": ("pool", "status"),
        "batches": ("batch", "list"),
        "rmi": ("models", "rm"),
        "serve": ("up",),
        # docker, systemctl
        "ps": ("status",),
        "top": ("status", "-w"),
        "stats": ("status", "-w"),
        "watch": ("status", "-w"),
        "monitor": ("status", "-w"),
        "inspect": ("describe",),
        "pause": ("drain",),
        "unpause": ("resume",),
        "log": ("logs",),
        "events": ("logs",),
        "journal": ("logs",),
        # kubectl
        "nodes": ("status",),
        "hosts": ("status",),
        "servers": ("status",),
        "pods": ("status",),
        "gpus": ("status",),
        "gpu": ("status",),
        "health": ("status",),
        "st": ("status",),
        "state": ("status",),
        "cluster-info": ("status",),
        "cordon": ("drain",),
        "uncordon": ("resume",),
        "diff": ("audit",),
        "validate": ("config", "check"),
        # nvidia-smi and its like
        "smi": ("status", "-v"),
        "nvidia-smi": ("status", "-v"),
        "nvtop": ("status", "-w"),
        "nvitop": ("status", "-w"),
        "htop": ("status", "-w"),
        # ssh
        "shell": ("ssh",),
        "sh": ("ssh",),
        "console": ("ssh",),
        "enter": ("ssh",),
        # gh
        "browse": ("ui",),
        "web": ("ui",),
        "open": ("ui",),
        "dashboard": ("ui",),
        "gui": ("ui",),
        # the same in other words
        "ask": ("run",),
        "prompt": ("run",),
        "generate": ("run",),
        "benchmark": ("bench",),
        "export": ("env",),
        "man": ("help",),
        "commands": ("help",),
    },
    ("node",): {
        "ls": ("list",),
        **dict.fromkeys(("remove", "delete", "del"), ("rm",)),
        **dict.fromkeys(("set", "change", "update"), ("edit",)),
        **dict.fromkeys(("new", "join", "create"), ("add",)),
    },
    ("models",): {
        "ls": ("list",),
        "ps": ("list",),
        "show": ("list",),
        "get": ("list",),
        "remove": ("rm",),
        "delete": ("rm",),
        "download": ("pull",),
        "add": ("pull",),
        "install": ("pull",),
        "stop": ("unload",),
        "warm": ("load",),
    },
    ("pool",): {
        **dict.fromkeys(("ls", "list", "ps", "show", "get", "describe"), ("status",)),
        **dict.fromkeys(("start", "run", "load", "create"), ("up",)),
        **dict.fromkeys(("stop", "rm", "remove", "delete", "unload"), ("down",)),
        **dict.fromkeys(("check", "fit", "explain"), ("plan",)),
    },
    ("batch",): {
        **dict.fromkeys(("ls", "ps"), ("list",)),
        **dict.fromkeys(("create", "add", "new", "run", "send", "start"), ("submit",)),
        **dict.fromkeys(("status", "get", "describe", "inspect"), ("show",)),
        "watch": ("show", "-w"),
        **dict.fromkeys(("result", "output", "download", "answers"), ("results",)),
        "errors": ("results", "--failed"),
        **dict.fromkeys(("resume", "restart", "rerun", "again"), ("retry",)),
        **dict.fromkeys(("stop", "kill", "abort"), ("cancel",)),
        **dict.fromkeys(("remove", "delete", "del"), ("rm",)),
    },
    ("config",): {
        "view": ("show",),
        "list": ("show",),
        "cat": ("show",),
        "print": ("show",),
        "validate": ("check",),
        "lint": ("check",),
        "test": ("check",),
    },
    ("bench",): {"start": ("run",), "ls": ("show",), "list": ("show",), "diff": ("compare",)},
}

_MODELFILE = (
    "a model is made on one host, `gpumesh exec NODE -- ollama create …`, then `gpumesh models sync` spreads it"
)
_TUNNELS = "`gpumesh up -d` opens all tunnels and keeps them open; another port is `gpumesh ssh NODE -L PORT:HOST:PORT`"
_CONTEXTS = "each mesh.yaml is a mesh of its own: `gpumesh --config FILE …`, or $GPUMESH_CONFIG; `gpumesh config check`"
_EDIT = "`gpumesh node edit NODE` changes a node in mesh.yaml, and `gpumesh reload` takes what you have edited yourself"
_RELOAD = "`gpumesh reload` lets the running mesh take what mesh.yaml says now"
_ADD = "`gpumesh node add 'ssh root@HOST -p PORT'` adds a node, and `gpumesh init` writes a first mesh.yaml"
_REMOVE = "`gpumesh node rm NODE` takes a node away, `gpumesh models rm MODEL` deletes a model"
_COPY = (
    "`gpumesh models sync` copies models; `gpumesh ssh NODE --print` prints the ssh command that scp and rsync can use"
)
_KEYS = (
    "the gateway's keys are in mesh.yaml (`gateway.keys`): `gpumesh config show`; `gpumesh env` hands one to clients"
)
_SERVICE = "`gpumesh service install` starts the mesh with the machine, `gpumesh up -d` starts it now"
_PACKAGE = "pip or pipx installs gpumesh itself; `gpumesh version` tells which one you have"
_LOGIN = (
    "nothing to log in to here: `gpumesh ssh NODE` logs in to a host, `gpumesh env` hands clients the gateway's key"
)
_ATTACH = "`gpumesh ssh NODE` opens a shell on a host, `gpumesh status -w` shows the running mesh"
_INFO = "`gpumesh status` shows the mesh, `gpumesh describe NODE` a node, `gpumesh doctor` this installation"
_SHOW = "`gpumesh describe NODE` shows a node, `gpumesh models` all models, `gpumesh config show` the configuration"
_RESTART = f"{_RELOAD}; `gpumesh reconnect NODE` opens a tunnel anew; else `gpumesh down`, then `gpumesh up -d`"
_SCALE = (
    "mesh.yaml says how many copies of a model are wanted (`models: {MODEL: {copies: 2}}`): `gpumesh reload` takes it"
)
_LABEL = "labels are in mesh.yaml: `gpumesh node edit NODE`"
_POOLS = "pools stand under `pools:` in mesh.yaml: `gpumesh pool plan MODEL` shows one, and what to write there"
_WAIT = "`gpumesh up -d` returns when the mesh serves, and `gpumesh status --check` says by its exit code how it is"
_API = "`gpumesh env` prints the gateway's address, for curl and every client of Ollama or OpenAI"
_KILL = "`gpumesh down --wait 0` stops the mesh at once, `gpumesh models unload MODEL` frees a model's memory"
_STOP = (
    "`gpumesh down` stops the mesh, `gpumesh drain NODE` a node, `gpumesh models unload MODEL` frees a model's memory"
)
_START = "`gpumesh up -d` starts the mesh, `gpumesh resume NODE` gives a node work, `gpumesh models load` loads a model"
_GET = "`gpumesh status` lists the nodes, `gpumesh models` the models, `gpumesh config show` the rest"
_METRICS = (
    "the gateway has /metrics for Prometheus, at the address that `gpumesh env` prints; `gpumesh status -w` shows them"
)
_CONNECT = (
    "`gpumesh up` opens all tunnels, `gpumesh reconnect NODE` one of them again, `gpumesh ssh NODE` gives a shell"
)
_TRUST = "`gpumesh trust NODE` shows and records a host's key"
_REQUESTS = "`gpumesh status -v` shows what the balancer has learned and decided, `gpumesh logs --access` each request"
_ENABLE = (
    "`gpumesh resume NODE` gives a node work again; `enabled:` in mesh.yaml is changed by `gpumesh node edit NODE`"
)
_DISABLE = (
    "`gpumesh drain NODE` gives a node no new work; `enabled:` in mesh.yaml is changed by `gpumesh node edit NODE`"
)

# Guesses that are answered by a sentence, because what is meant is not clear, or is done differently here.
POINTERS: Mapping[tuple[str, ...], Mapping[str, str]] = {
    (): {
        **dict.fromkeys(("create", "build", "push", "commit", "modelfile"), _MODELFILE),
        **dict.fromkeys(("forward", "port-forward", "tunnel", "tunnels", "proxy", "port", "expose"), _TUNNELS),
        **dict.fromkeys(("context", "contexts", "ctx", "use", "switch", "profile", "namespace", "ns"), _CONTEXTS),
        **dict.fromkeys(("edit", "set", "patch", "replace", "configure", "update"), _EDIT),
        **dict.fromkeys(("apply", "refresh", "sighup"), _RELOAD),
        **dict.fromkeys(("add", "new", "join", "register", "setup", "import"), _ADD),
        **dict.fromkeys(("rm", "delete", "remove", "del", "prune"), _REMOVE),
        **dict.fromkeys(("cp", "copy", "scp", "sftp", "rsync", "sshfs"), _COPY),
        **dict.fromkeys(("key", "keys", "token", "tokens", "secret", "secrets", "apikey"), _KEYS),
        **dict.fromkeys(("daemon", "systemd", "enable-service", "autostart"), _SERVICE),
        **dict.fromkeys(("install", "uninstall", "upgrade", "self-update"), _PACKAGE),
        **dict.fromkeys(("login", "logout", "auth", "signin", "signout", "whoami"), _LOGIN),
        **dict.fromkeys(("attach", "session", "tmux"), _ATTACH),
        **dict.fromkeys(("info", "system", "about"), _INFO),
        **dict.fromkeys(("wait", "ready", "check", "test", "ping"), _WAIT),
        **dict.fromkeys(("api", "curl", "url", "endpoint", "endpoints", "gateway", "client"), _API),
        **dict.fromkeys(("metrics", "prometheus", "grafana"), _METRICS),
        **dict.fromkeys(("connect", "disconnect", "reattach"), _CONNECT),
        **dict.fromkeys(("ssh-copy-id", "ssh-keyscan", "keyscan", "known-hosts", "fingerprint"), _TRUST),
        **dict.fromkeys(("queue", "jobs", "requests", "route", "routes", "history"), _REQUESTS),
        **dict.fromkeys(("scale", "autoscale", "replicas"), _SCALE),
        **dict.fromkeys(("label", "annotate", "taint", "tag", "rename"), _LABEL),
        "show": _SHOW,
        "get": _GET,
        "kill": _KILL,
        "stop": _STOP,
        "start": _START,
        "restart": _RESTART,
        "reboot": _RESTART,
        "rollout": _RESTART,
        "enable": _ENABLE,
        "disable": _DISABLE,
        "search": "`gpumesh models pull MODEL` fetches a model by its name; the names are at ollama.com/library",
        "debug": "`gpumesh doctor` reports on this installation, `gpumesh logs` tells what happened, `gpumesh ssh NODE`"
        " gives a shell",
        "embed": f"embeddings go through the gateway: {_API}",
        "docs": "`gpumesh help` lists the commands, `gpumesh explain CODE` tells what a finding means",
        "cancel": "Ctrl-C ends your own `gpumesh run`; `gpumesh ui` shows the requests of all clients",
        "codespace": "`gpumesh ssh NODE` opens a shell on a host",
    },
    ("models",): {
        "run": "`gpumesh run MODEL PROMPT` sends a prompt to a model",
        "cp": _COPY,
        "copy": _COPY,
        "create": _MODELFILE,
        "push": _MODELFILE,
        "help": "`gpumesh help models` shows how it is used",
        "info": "`gpumesh models list -o wide` shows all models, `gpumesh describe NODE` those of a node",
        "search": "`gpumesh models pull MODEL` fetches a model by its name; the names are at ollama.com/library",
    },
    ("config",): {
        "edit": _EDIT,
        "set": _EDIT,
        "get": "`gpumesh config show` prints all that is in effect",
        "init": "`gpumesh init` writes a mesh.yaml",
        "path": "`gpumesh doctor` tells which file is used, and `gpumesh config check` whether it is valid",
        "reload": _RELOAD,
        "help": "`gpumesh help config` shows how it is used",
        **dict.fromkeys(("get-contexts", "use-context", "current-context", "set-context"), _CONTEXTS),
    },
    ("node",): {
        **dict.fromkeys(("ps", "status"), "`gpumesh status` lists the nodes"),
        **dict.fromkeys(
            ("show", "describe", "inspect", "get"), "`gpumesh describe NODE` shows all that is known of a node"
        ),
        "ssh": "`gpumesh ssh NODE` opens a shell on its host",
        "drain": "`gpumesh drain NODE` gives a node no new work",
        "restart": _RESTART,
        "help": "`gpumesh help node` shows how it is used",
    },
    ("service",): {
        "start": "`gpumesh up -d` starts the mesh; `gpumesh service install` lets the system do that",
        "stop": "`gpumesh down` stops the mesh",
        "restart": _RESTART,
        "logs": "`gpumesh logs` shows the mesh's log",
    },
    ("pool",): {
        **dict.fromkeys(("add", "new", "edit", "set"), _POOLS),
        "restart": "`gpumesh pool down NAME`, then `gpumesh pool up NAME`",
        "logs": "`gpumesh logs` has what llama.cpp's programs last wrote, `gpumesh pool status NAME` why a pool failed",
        "help": "`gpumesh help pool` shows how it is used",
    },
    ("batch",): {
        "logs": "`gpumesh batch show BATCH` shows how far it is, `gpumesh batch results BATCH --failed` what failed",
        "pause": "`gpumesh batch cancel BATCH` ends it, and `gpumesh batch retry BATCH` goes on with the rest",
        "help": "`gpumesh help batch` shows how it is used",
    },
    ("bench",): {"help": "`gpumesh help bench` shows how it is used"},
}
