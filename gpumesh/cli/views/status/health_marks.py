"""The mark and the colour of each health, and the colour of figures.

A colour means the same in every view: green is well, yellow is a warning, red is a fault, cyan is information that
nobody has to act on, dim is what is not known or does not count.
"""

from __future__ import annotations

from gpumesh.state import Health

MARKS = {Health.HEALTHY: "●", Health.DEGRADED: "◐", Health.DOWN: "✗", Health.DRAINING: "‖", Health.UNKNOWN: "?"}
FIGURE_STYLE = "cyan"  # of bars and sparklines
STYLES = {
    Health.HEALTHY: "green",
    Health.DEGRADED: "yellow",
    Health.DOWN: "red",
    Health.DRAINING: "cyan",
    Health.UNKNOWN: "dim",
}
