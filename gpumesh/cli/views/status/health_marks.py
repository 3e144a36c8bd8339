"""The mark and the colour of each health."""

from __future__ import annotations

from gpumesh.state import Health

MARKS = {Health.HEALTHY: "●", Health.DEGRADED: "◐", Health.DOWN: "✗", Health.DRAINING: "‖", Health.UNKNOWN: "?"}
STYLES = {
    Health.HEALTHY: "green",
    Health.DEGRADED: "yellow",
    Health.DOWN: "red",
    Health.DRAINING: "cyan",
    Health.UNKNOWN: "dim",
}
