"""The report's section about the load: how busy the load generator, the mesh and this machine were in each stage."""

from __future__ import annotations

from gpumesh.bench.figures.summary import StageResult, stage_label
from gpumesh.bench.load.conditions import LoadConditions, Via
from gpumesh.bench.report import svg
from gpumesh.bench.report.html_parts import escape_text, html_table
from gpumesh.bench.results.result import BenchResult, Environment

EXPLANATION = (
    "CPU is in cores: 1 is one core all the time. Lag: how late the load generator's event loop ran (90th percentile). "
    "A stage with a limit has figures that may not be those of the servers; the notes above say why."
)
COLUMNS = (
    "stage",
    "load generator CPU",
    "lag ms",
    "CPU µs per piece",
    "mesh CPU",
    "busiest tunnel CPU",
    "machine busy",
    "other programs CPU",
    "limit",
)


def load_html(result: BenchResult) -> str:
    """The section about the load; empty for a result of an older version, which has no such figures."""
    rows = [_row(stage, stage.conditions) for stage in result.stages if stage.conditions is not None]
    if not rows:
        return ""
    return f'<h2>Where the load came from</h2><p class="sub">{EXPLANATION}</p>' + html_table(COLUMNS, rows)


def _row(stage: StageResult, conditions: LoadConditions) -> list[str]:
    """The cells of a stage, in the order of ``COLUMNS``."""
    machine = conditions.machine
    return [
        escape_text(stage_label(stage)),
        svg.format_number(conditions.generator.cpu),
        svg.format_number(conditions.lag_p90_ms),
        svg.format_number(conditions.us_per_piece),
        svg.format_number(None if conditions.mesh is None else conditions.mesh.cpu),
        svg.format_number(conditions.tunnel_cpu),
        svg.format_number(None) if machine is None else f"{machine.busy:.0%} of {machine.cores} cores",
        svg.format_number(None if machine is None else machine.other_cpu),
        "" if conditions.limit is None else conditions.limit.value.upper(),
    ]


def describe_mesh_access(environment: Environment) -> str:
    """Where the mesh ran, and how the requests reached it or its nodes."""
    if environment.url is not None:
        return f"none: {environment.url} was measured, from a process of its own"
    place = "in the process of the command" if environment.embedded else "already running"
    match environment.via:
        case Via.GATEWAY:
            return f"{place}; requests went through its gateway, from a process of its own"
        case Via.DIRECT:
            return f"{place}; requests went past it to the local ports of its tunnels, from a process of its own"
        case Via.MESH if not environment.embedded:
            return f"{place}; requests went over its control socket, from the process of the command"
    return place if environment.embedded else f"{place}, over its control socket"
