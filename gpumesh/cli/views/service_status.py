"""What `gpumesh service` says of the service: after `install`, and for `status`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpumesh.cli.views.safe_text import clean_line
from gpumesh.text.sentences import join_all

if TYPE_CHECKING:
    from gpumesh.daemon.service.definition import ServiceDefinition
    from gpumesh.daemon.service.managers import ServiceManager

LABEL_WIDTH = 10  # of the first column of `status`
_ORIGIN_TEXTS = {
    "missing": "not installed: `gpumesh service install` does that",
    "ours": "",
    "changed": "changed since `gpumesh service install` wrote it",
    "foreign": "not written by `gpumesh service install`",
}


def installed_lines(manager: ServiceManager, definition: ServiceDefinition, needed: Sequence[str]) -> Iterator[str]:
    """What `install` did, in one sentence; then what a person should know or do."""
    name, state = definition.name, manager.state(definition.name)
    running = f"it runs now (pid {state.pid})" if state.is_active else f"it is {state.state} now"
    yield clean_line(
        f"the service {name} keeps the mesh of {definition.config} up, with {manager.path(name)}: {running}, and "
        f"`{manager.log_command(name)}` and `gpumesh logs` show its log"
    )
    remark = manager.boot_remark()
    if remark is not None:
        yield remark
    missing = _missing_variables(definition, needed)
    if missing:
        yield clean_line(
            f"mesh.yaml names {join_all(missing)}, and a service has only what {definition.variables_file} says "
            f"(NAME=value lines, mode 0600): add them there and `{manager.restart_command(name)}`, or set them here "
            "and `gpumesh service install --save-variables`"
        )
    if _is_open_to_others(definition):
        yield clean_line(f"others can read {definition.variables_file}: `chmod 600` it")


def describe_service(
    manager: ServiceManager, definition: ServiceDefinition, needed: Sequence[str], *, text: str | None
) -> dict[str, Any]:
    """The document of `service status --json`. ``text``: of the unit; ``None`` if there is no unit."""
    origin = manager.origin(text)
    state = manager.state(definition.name)
    return {
        "name": definition.name,
        "file": str(manager.path(definition.name)),
        "origin": origin.value,
        "up_to_date": text == manager.render(definition),
        "active": state.is_active,
        "state": state.state,
        "pid": state.pid,
        "since": state.since,
        "restarts": state.restarts,
        "starts_by_itself": state.starts_by_itself,
        "remark": manager.boot_remark() if text is not None else None,
        "config": str(definition.config),
        "variables_file": str(definition.variables_file),
        "variables": list(needed),
        "missing_variables": list(_missing_variables(definition, needed)),
        "variables_file_is_private": not _is_open_to_others(definition),
        "log_command": manager.log_command(definition.name),
    }


def status_lines(document: dict[str, Any]) -> Iterator[str]:
    """The document as lines for a person."""
    is_installed = document["origin"] != "missing"
    remark = _ORIGIN_TEXTS[document["origin"]]
    if document["origin"] == "ours" and not document["up_to_date"]:
        remark = "`gpumesh service install` would write it anew, for this mesh.yaml and this gpumesh"
    yield _row("unit", document["file"] + (f" ({remark})" if remark else ""))
    if not is_installed and not document["active"]:
        return
    state = document["state"]
    if document["pid"] is not None:
        state += f", pid {document['pid']}"
    if document["since"] is not None and document["active"]:
        state += f", since {document['since']}"
    if document["restarts"]:
        state += f", started again {document['restarts']} time{'' if document['restarts'] == 1 else 's'}"
    yield _row("state", state)
    boot = "the system starts it" if document["starts_by_itself"] else "the system does not start it by itself"
    yield _row("at boot", boot + (f"; {document['remark']}" if document["remark"] else ""))
    yield _row("mesh.yaml", document["config"])
    if document["variables"]:
        yield _row("variables", _describe_variables(document))
    yield _row("log", f"`{document['log_command']}`, `gpumesh logs`")


def _describe_variables(document: dict[str, Any]) -> str:
    text = f"{join_all(document['variables'])}, from {document['variables_file']}"
    if document["missing_variables"]:
        text += f"; missing there: {join_all(document['missing_variables'])}"
    if not document["variables_file_is_private"]:
        text += "; others can read that file: `chmod 600` it"
    return text


def _row(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}} {clean_line(text)}"


def _missing_variables(definition: ServiceDefinition, needed: Sequence[str]) -> tuple[str, ...]:
    """The variables that mesh.yaml names and the service's file lacks."""
    from gpumesh.daemon.service.variables_file import read_names

    names = read_names(definition.variables_file)
    return tuple(name for name in needed if name not in names)


def _is_open_to_others(definition: ServiceDefinition) -> bool:
    """Whether other users can read the file with the variables."""
    from gpumesh.daemon.service.variables_file import is_private

    try:
        return not is_private(definition.variables_file)
    except OSError:  # there is no such file, or it is not for us to see
        return False
