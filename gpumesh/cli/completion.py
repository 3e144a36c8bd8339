"""What the shell may complete: names of nodes and models. Never an error, never a wait: a file and a socket at most.

What is completed is text that a shell takes in: Typer's script for zsh evaluates it, bash inserts it as it is. So two
gates stand here. ``_names`` lets through only names that no shell and no program reads anything into; each list of
names goes through it. And ``sanitize_completions`` lets nothing else out of Typer, whichever parameter it comes from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from gpumesh.errors import GPUMeshError
from gpumesh.quoting import is_plain

# Typer's own, but for the colons that names of models have (and an @, which is rare). Where bash breaks words at them,
# it completes only the text behind a colon, or from an @ on: the parts are put together again before they are asked
# about, and the text before is not said twice. Where COMP_WORDBREAKS has no colon (npm's completion takes it away), a
# word is whole already, and is replaced as a whole. For bash 3.2 as well (macOS).
BASH_SCRIPT = """
%(complete_func)s() {
    local IFS=$'\\n' word words=() last=-1 breaks=${COMP_WORDBREAKS//[^:@]/} ready
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if (( last >= 0 )) && [[ -n $breaks && ( $word == [$breaks]* || ${words[last]} == *[$breaks] ) ]]; then
            words[last]+=$word
        else
            words[++last]=$word
        fi
    done
    word=${words[last]}
    COMPREPLY=( $( env COMP_WORDS="${words[*]}" \\
                   COMP_CWORD=$last \\
                   %(autocomplete_var)s=complete_bash $1 ) )
    if [[ -n $breaks ]]; then
        ready=${word%%"${word##*[$breaks]}"}
        ready=${ready%%@}
        COMPREPLY=( "${COMPREPLY[@]#"$ready"}" )
    fi
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""

# Typer's own evaluates what the program prints, and completes no name with a colon. This one asks for lines of a value,
# a tab and its help, as fish does, and hands them on as they are. zsh calls the file itself as a function, when it lies
# in $fpath; elsewhere it is read once, and registers its function.
ZSH_SCRIPT = """
#compdef %(prog_name)s

%(complete_func)s() {
    local line value
    local -a proposals=()
    for line in "${(@f)$(env %(autocomplete_var)s=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \\
                         _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" %(prog_name)s)}"; do
        value=${${line%%%%$'\\t'*}//:/\\\\:}
        [[ $line == *$'\\t'* ]] && value+=:${line#*$'\\t'}
        [[ -n $value ]] && proposals+=("$value")
    done
    if (( $#proposals )); then
        _describe -V %(prog_name)s proposals
    else
        _files
    fi
}

if [[ $zsh_eval_context[-1] == (loadautofunc|shfunc) ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


def install_completion_scripts() -> None:
    """Lets ``--install-completion`` and ``--show-completion`` give the scripts above."""
    from typer import _completion_shared as shared

    # Private to Typer: a version that has it no more gives its own scripts, which stop at a colon.
    scripts = getattr(shared, "_completion_scripts", {})
    scripts["bash"], scripts["zsh"] = BASH_SCRIPT, ZSH_SCRIPT


def sanitize_completions() -> None:
    """Lets nothing but plain words out to a shell, whoever proposes them. Names of files are left to the shell, which
    quotes them: Typer would only give back what stands on the line already."""
    try:
        from typer import _completion_classes as classes
    except ImportError:  # private to Typer: without them, each of our own lists is still held to ``_names``
        return
    for name in ("BashComplete", "ZshComplete", "FishComplete", "PowerShellComplete"):
        kind: Any = getattr(classes, name, None)
        if kind is not None and not hasattr(kind.get_completions, "guarded"):
            kind.get_completions = _guarded(kind.get_completions)


def _guarded(get: Callable[[Any, list[str], str], list[Any]]) -> Callable[[Any, list[str], str], list[Any]]:
    def get_completions(self: Any, args: list[str], incomplete: str) -> list[Any]:
        # Options are proposed where a hyphen stands already, and only there.
        hyphens = "-" if incomplete.startswith("-") else ""
        proposed = get(self, args, incomplete)
        return [item for item in proposed if item.type == "plain" and is_plain(item.value.lstrip(hyphens))]

    get_completions.guarded = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return get_completions


def _names(names: Iterable[object], incomplete: str) -> list[str]:
    """Those that begin as what is on the line does, and that are safe in every shell."""
    return [name for name in names if isinstance(name, str) and name.startswith(incomplete) and is_plain(name)]


def complete_nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """The nodes of mesh.yaml. Nothing that it names is run for this, nor is ssh asked what an alias means."""
    with contextlib.suppress(GPUMeshError, OSError):
        from gpumesh import config
        from gpumesh.config import environment, reader

        path = config.find_config(_chosen(ctx))
        text = reader.read_text(path, path.name)
        topology = config.parse(text, file=path.name, env=environment.variables(), home=environment.home(), source=path)
        return _names((node.name for node in topology.nodes), incomplete)
    return []


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models that a running mesh knows of. What their hosts call them is hostile until ``_names`` has seen it."""
    names: set[str] = set()
    with contextlib.suppress(GPUMeshError, OSError, KeyError, TypeError):
        from gpumesh import config
        from gpumesh.daemon import paths
        from gpumesh.daemon.quick_status import fetch_status

        state = fetch_status(paths.for_config(config.find_config(_chosen(ctx))).socket, timeout_s=0.5)
        for node in state["nodes"] if state is not None else ():
            names.update(_names(node["backend"]["models"], incomplete))
    return sorted(names)


def complete_priorities(incomplete: str) -> list[str]:
    from gpumesh.balancer.base import Priority

    return [priority for priority in Priority if priority.startswith(incomplete)]


def complete_scenarios(incomplete: str) -> list[str]:
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
