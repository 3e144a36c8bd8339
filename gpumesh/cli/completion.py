"""What the shell may complete: names of nodes and models. Never an error, never a wait: a file and a socket at most."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import typer

from gpumesh.errors import GPUMeshError

# Typer's own, but for the colons that names of models have. Bash breaks words there: they are put together again before
# they are asked about, and what stands before the last colon is not said twice. For bash 3.2 as well (macOS).
BASH = """
%(complete_func)s() {
    local IFS=$'\\n' word words=() last=-1
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if (( last >= 0 )) && [[ $word == :* || ${words[last]} == *: ]]; then
            words[last]+=$word
        else
            words[++last]=$word
        fi
    done
    word=${words[last]}
    COMPREPLY=( $( env COMP_WORDS="${words[*]}" \\
                   COMP_CWORD=$last \\
                   %(autocomplete_var)s=complete_bash $1 ) )
    COMPREPLY=( "${COMPREPLY[@]#"${word%%"${word##*:}"}"}" )
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""


def for_bash() -> None:
    """Lets ``--install-completion`` and ``--show-completion`` give the script above for bash."""
    from typer import _completion_shared as shared

    # Private to Typer: a version that has it no more gives its own script, which stops at a colon.
    getattr(shared, "_completion_scripts", {})["bash"] = BASH


def nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """The nodes of mesh.yaml."""
    with contextlib.suppress(GPUMeshError, OSError):
        from gpumesh import config

        topology = config.load(config.find(_chosen(ctx)))
        return [node.name for node in topology.nodes if node.name.startswith(incomplete)]
    return []


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models that a running mesh knows of."""
    names: set[str] = set()
    with contextlib.suppress(GPUMeshError, OSError, KeyError, TypeError):
        from gpumesh import config
        from gpumesh.daemon import paths
        from gpumesh.daemon.glance import glance

        state = glance(paths.for_config(config.find(_chosen(ctx))).socket, timeout_s=0.5)
        for node in state["nodes"] if state is not None else ():
            names.update(name for name in node["backend"]["models"] if name.startswith(incomplete))
    return sorted(names)


def priorities(incomplete: str) -> list[str]:
    from gpumesh.balancer.base import Priority

    return [priority for priority in Priority if priority.startswith(incomplete)]


def scenarios(incomplete: str) -> list[str]:
    """Those of `bench run`."""
    from gpumesh.bench.scenarios import Scenario

    return [scenario for scenario in Scenario if scenario.startswith(incomplete)]


def _chosen(ctx: typer.Context) -> Path | None:
    """``--config``, before or behind the command's name."""
    if (late := ctx.meta.get("gpumesh.config")) is not None:
        return Path(late)
    context: Any = ctx
    while context is not None:
        if (named := context.params.get("config")) is not None:
            return Path(named)
        context = context.parent
    return None
