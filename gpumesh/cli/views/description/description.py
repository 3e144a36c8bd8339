"""Draws all that is known of a node, for `gpumesh describe`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpumesh.cli.views.console import console, print_plain
from gpumesh.cli.views.description.facts import Fact, FactSection, list_sections
from gpumesh.cli.views.findings import make_notes_table
from gpumesh.cli.views.safe_text import clean_line, clean_text
from gpumesh.cli.views.status.health_marks import MARKS, STYLES
from gpumesh.cli.views.status.remarks import list_remarks
from gpumesh.cli.views.status.scheduling import describe_decision, describe_loading
from gpumesh.state import MeshState, NodeState

LABEL_WIDTH = 15  # characters of the longest label


def print_description(state: MeshState, settings: str | None) -> None:
    """Prints the only node of the state to stdout. ``settings``: the node's entry in mesh.yaml, without secrets;
    ``None`` if the file has no such node any more."""
    print_plain(console(), Group(*_parts(state, settings)))


def _parts(state: MeshState, settings: str | None) -> Iterator[RenderableType]:
    """The parts of the description, from above: the node, its remarks, the sections with facts, the settings."""
    (node,) = state.nodes
    head = Text.assemble((MARKS[node.health], STYLES[node.health]), " ", (clean_line(node.name, 60), "bold"))
    head.append(f"  {node.health}", style=STYLES[node.health])
    if node.simulated:
        head.append("  simulated host", style="yellow")
    yield head
    remarks = list_remarks(state)
    if remarks:
        yield make_notes_table(remarks)
    balancer = FactSection("Balancer", list(_balancer_facts(node)))
    for section in (*list_sections(node, state.at), balancer):
        if not section.facts:
            continue
        yield Text(f"\n{section.title}", style="bold")
        yield _draw_facts(section.facts)
    if settings is not None:
        yield Text("\nSettings", style="bold")
        yield Text("\n".join(f"  {line}" for line in clean_text(settings).splitlines()), overflow="fold")


def _balancer_facts(node: NodeState) -> Iterator[Fact]:
    """What the balancer has learned of each model here, its last forecast, and the loads of the last minutes."""
    for learned in node.learned:
        known = [
            (learned.tokens_per_s, "{:,.0f} tokens/s alone"),
            (learned.prefill_tokens_per_s, "reads {:,.0f} tokens/s"),
            (learned.load_s, "loads in {:.1f} s"),
            (learned.slots, "{} at once"),
        ]
        figures = [template.format(value) for value, template in known if value is not None]
        if learned.neighbour_share is not None:
            figures.append(f"each neighbour makes a token {100.0 * learned.neighbour_share:.0f} % longer")
        yield "learned", ", ".join([learned.model, *figures])
    if node.decisions:
        yield "forecast", describe_decision(node.decisions[0])
    if node.loading is not None:
        yield "loads", describe_loading(node.loading)


def _draw_facts(facts: Sequence[Fact]) -> Table:
    """A label on the left, its text on the right. A label that repeats the one above is left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, width=LABEL_WIDTH, style="dim")
    table.add_column(overflow="fold")
    previous_label = None
    for label, text in facts:
        shown_label = "" if label == previous_label else label
        table.add_row(Text(f"  {clean_line(shown_label, LABEL_WIDTH)}"), Text(clean_line(text)))
        previous_label = label
    return table
