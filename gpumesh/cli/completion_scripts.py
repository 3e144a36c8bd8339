"""The completion scripts for bash and zsh, and the filter that gives only plain words to a shell.

Typer's script for zsh evaluates what the program prints, and bash inserts it as it is. So completed text must be safe
for a shell. ``filter_typer_completions`` filters everything that Typer proposes; ``completion.py`` filters its own
lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpumesh.text.quoting import is_plain

# Typer's script, extended for the colons in names of models (and for @, which is rare). Where bash breaks words at
# these characters, it completes only the text after a colon, or from an @ on. So the script joins the parts before it
# asks the program, and removes the text before the break from each proposal. Where COMP_WORDBREAKS has no colon (npm's
# completion removes it), a word is whole already and is replaced as a whole. Works with bash 3.2 too (macOS).
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

# Typer's script evaluates what the program prints, and completes no name with a colon. This one asks for lines of a
# value, a tab and its help, as fish does, and passes them on as they are. When the file is in $fpath, zsh calls it as a
# function; elsewhere it is read once and registers its function.
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


def make_script(shell: str) -> str:
    """The script for a shell: ``bash``, ``zsh``, ``fish`` or ``powershell``. Raises GPUMeshError with a version of
    Typer that does not give it."""
    from gpumesh.errors import GPUMeshError

    install_completion_scripts()
    try:
        from typer._completion_shared import get_completion_script  # private to Typer
    except ImportError:
        raise GPUMeshError(
            "this version of Typer does not give the script", hint="`gpumesh --show-completion` prints that of $SHELL"
        ) from None
    return get_completion_script(prog_name="gpumesh", complete_var="_GPUMESH_COMPLETE", shell=shell)


def install_completion_scripts() -> None:
    """Makes ``--install-completion`` and ``--show-completion`` give the scripts above."""
    from typer import _completion_shared as shared

    # This dictionary is private to Typer. With a version that lacks it, the lines here change an empty dictionary which
    # nobody reads, and Typer gives its own scripts, which stop at a colon.
    scripts = getattr(shared, "_completion_scripts", {})
    scripts["bash"], scripts["zsh"] = BASH_SCRIPT, ZSH_SCRIPT


def filter_typer_completions() -> None:
    """Patches Typer's completers, so that a shell gets only plain words, whichever parameter proposes them. File names
    that are removed are no loss: the shell completes and quotes file names itself, and Typer would only repeat the text
    that is already on the line."""
    try:
        from typer import _completion_classes as classes
    except ImportError:  # private to Typer; without them our own lists are still filtered in completion.py
        return
    for name in ("BashComplete", "ZshComplete", "FishComplete", "PowerShellComplete"):
        completer: Any = getattr(classes, name, None)
        if completer is not None and not hasattr(completer.get_completions, "is_filtered"):
            completer.get_completions = _filter_completions(completer.get_completions)


def _filter_completions(
    get_unfiltered: Callable[[Any, list[str], str], list[Any]],
) -> Callable[[Any, list[str], str], list[Any]]:
    """A ``get_completions`` that returns only the plain words among the completions of ``get_unfiltered``, Typer's
    own."""

    def get_completions(self: Any, args: list[str], incomplete: str) -> list[Any]:
        # A word that begins with a hyphen is an option, so it is not plain. It is proposed only if the person has typed
        # a hyphen. Then its hyphens are removed before the test. (Otherwise nothing is removed: `lstrip("")`.)
        allowed_prefix = "-" if incomplete.startswith("-") else ""
        words = [candidate for candidate in get_unfiltered(self, args, incomplete) if candidate.type == "plain"]
        return [word for word in words if is_plain(word.value.lstrip(allowed_prefix))]

    get_completions.is_filtered = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return get_completions
