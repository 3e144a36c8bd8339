"""Writes the parts of the reference that follow from the code: docs/commands.md, docs/codes.md, docs/metrics.md.

    python docs/generate.py            writes them
    python docs/generate.py --check    exits 1 if they are not as they would be written

tests/test_docs.py does the same check.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typer.main import get_command

from gpumesh import errors
from gpumesh.audit.catalog import CATALOG
from gpumesh.cli.root_command import app
from gpumesh.errors import ExitCode, GPUMeshError, TunnelError
from gpumesh.gateway.observe import gauges
from gpumesh.gateway.observe.forecast_metrics import forecast_families
from gpumesh.gateway.observe.metrics import RequestMetrics
from gpumesh.gateway.usage.recorder import UsageRecorder
from gpumesh.state import GatewayState, MeshState, compute_totals

FOLDER = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py from the code; change it there. -->"
# The options of `gpumesh` itself may stand behind any command, and are told once.
GLOBAL = ("--config", "--quiet", "--verbose")
MEANINGS = {
    ExitCode.OK: "fine",
    ExitCode.FAILED: "the operation failed",
    ExitCode.USAGE: "the command line or the configuration is wrong",
    ExitCode.DEGRADED: "it works, but something is not as it should be (`status --check`, `audit`, `init`)",
    ExitCode.NO_NODE: "no node can serve",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
}


# -- commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    root = get_command(app)
    lines = ["# Commands", "", NOTE, "", "```text", "gpumesh [OPTIONS] COMMAND [ARGS]...", "```", ""]
    lines += [*_table("option", [parameter for parameter in root.params if parameter.opts != ["--help"]]), ""]
    lines += [
        "`--config`, `--quiet` and `--verbose` may also stand behind a command's name: `gpumesh status -c mesh.yaml`.",
        "Results go to stdout, progress and remarks to stderr. Colours appear on terminals only, and never with"
        " `NO_COLOR`.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        *(f"| {code.value} | {MEANINGS[code]} |" for code in ExitCode),
        "",
    ]
    for name, command in root.commands.items():  # type: ignore[attr-defined]  # a group
        lines += _command(f"gpumesh {name}", command, "##")
    return _text(lines)


def _command(path: str, command: Any, mark: str) -> Iterator[str]:
    own = [parameter for parameter in command.params if not _is_global(parameter)]
    subcommands = getattr(command, "commands", {})
    yield f"{mark} {path}"
    yield ""
    words, examples = _help(command.help or "")
    yield from words
    if not subcommands:
        yield "```text"
        yield _usage(path, own)
        yield "```"
        yield ""
    for title, parameters in (
        ("argument", [each for each in own if _is_argument(each) and each.help]),
        ("option", [each for each in own if not _is_argument(each)]),
    ):
        if parameters:
            yield from _table(title, parameters)
            yield ""
    if examples:
        yield "```sh"
        yield from examples
        yield "```"
        yield ""
    for name, inner in subcommands.items():
        yield from _command(f"{path} {name}", inner, mark + "#")


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _is_global(parameter: Any) -> bool:
    return any(option in GLOBAL for option in parameter.opts)


def _help(text: str) -> tuple[list[str], list[str]]:
    """Paragraphs of prose, each followed by an empty line, and the lines of the examples."""
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        verbatim = paragraph.startswith("\b")
        lines = paragraph.removeprefix("\b").strip("\n").splitlines()
        if verbatim and lines[0].strip() == "Examples:":
            # What stands behind an example, some blanks apart, is said of it and not part of it.
            examples += [re.sub(r"(?<=\S)\s{2,}(?=\S)", "  # ", line.strip()) for line in lines[1:]]
        elif verbatim:
            prose += ["```text", *lines, "```", ""]
        else:
            prose += [*lines, ""]
    return prose, examples


def _usage(path: str, parameters: list[Any]) -> str:
    words = [path, "[OPTIONS]"] if any(not _is_argument(each) for each in parameters) else [path]
    for parameter in parameters:
        if _is_argument(parameter):
            name = parameter.metavar or parameter.name.upper()
            words.append(name if parameter.required or name.startswith("[") else f"[{name}]")
    return " ".join(words)


def _table(title: str, parameters: list[Any]) -> Iterator[str]:
    yield f"| {title} | |"
    yield "|---|---|"
    for parameter in parameters:
        if _is_argument(parameter):
            names = parameter.metavar or parameter.name.upper()
        else:
            names = ", ".join(sorted([*parameter.opts, *parameter.secondary_opts], key=lambda name: name.count("-")))
            if not parameter.is_flag:
                names += " " + (parameter.metavar or parameter.name.upper().replace("_", "-"))
        yield f"| `{_cell(names)}` | {_cell(parameter.help or '')}{_default(parameter)} |"


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value is False or value in ((), []) else f" Default: `{value}`."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# -- codes -----------------------------------------------------------------------------------------------------------


def codes() -> str:
    raised = _raised()
    lines = [
        "# Codes",
        "",
        NOTE,
        "",
        "A code names what is wrong, and stays the same over versions. It stands in the findings of `gpumesh audit` and"
        " `gpumesh status`, in their JSON, in the log, and in errors; `gpumesh explain CODE` says what this page says.",
        "",
        "| code | severity | |",
        "|---|---|---|",
    ]
    lines += [f"| [`{entry.code}`](#{entry.code}) | {entry.severity} | {entry.title} |" for entry in CATALOG.values()]
    for entry in CATALOG.values():
        lines += ["", f"## {entry.code}", "", f"*{entry.title[0].upper()}{entry.title[1:]}.* {entry.meaning}", ""]
        lines += [f"**What to do:** {entry.remedy}"]
        kind = raised.get(entry.code)
        if kind is not None and issubclass(kind, TunnelError):
            again = "It is tried again slowly: a person must act." if kind.needs_person else "It is tried again."
            lines += ["", f"As a reason why a tunnel is not up: {again}"]
        elif kind is not None:
            lines += ["", f"As an error of a command: exit code {kind.exit_code.value}."]
    return _text(lines)


def _raised() -> dict[str, type[GPUMeshError]]:
    """Each error class of errors.py by its code."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GPUMeshError)]
    return {kind.code: kind for kind in kinds}


# -- metrics ---------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """Families tell their names and meanings before there is anything to count."""
    nothing = MeshState("", datetime(2026, 1, 1, tzinfo=UTC), GatewayState(), compute_totals(()), ())
    families = [
        *gauges.mesh_families(nothing, {}),
        *gauges.server_families(0, 0, 0),
        *RequestMetrics().families(),
        *forecast_families({}),
        *UsageRecorder(find_label=RequestMetrics().model_label).families(),
    ]
    lines = [
        "# Metrics",
        "",
        NOTE,
        "",
        "What `GET /metrics` on [the gateway](gateway.md) tells, in Prometheus's text format. Times are seconds, memory"
        " is bytes, shares are 0 to 1. Beside these there are the usual `process_…` of the gateway's own process.",
        "",
        "| metric | type | |",
        "|---|---|---|",
    ]
    lines += [f"| `{family.name}` | {family.kind} | {_cell(family.help)} |" for family in families]
    return _text(lines)


# -- files -----------------------------------------------------------------------------------------------------------


def pages() -> dict[Path, str]:
    return {FOLDER / "commands.md": commands(), FOLDER / "codes.md": codes(), FOLDER / "metrics.md": metrics()}


def _text(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text() != text}
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is out of date: run `python docs/generate.py`", file=sys.stderr)
        return bool(stale)
    for path, text in stale.items():
        path.write_text(text)
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
