"""Takes over what a server reports of its memory into the balancer's account of its node."""

from __future__ import annotations

from gpumesh.balancer.account import NodeAccount
from gpumesh.balancer.models.model_rules import ModelRules
from gpumesh.mesh.nodes.prober import NodeReports
from gpumesh.text.model_names import full_name


def take_over_report(account: NodeAccount, reports: NodeReports, rules: ModelRules, *, asked_at: float) -> list[str]:
    """Tells the account which models the server has in memory, by its last report, for which it was asked at
    ``asked_at``. Returns the full names of the models that are not in memory any more."""
    residency = account.residency
    if reports.backend is None or not reports.backend_is_up:
        return []
    state = reports.backend.state
    name_in_mesh = rules.name_in_mesh
    loaded = {
        full_name(name_in_mesh(model.name)): (model.size_vram_mib, model.context_length) for model in state.loaded
    }
    residency.file_mib = {
        full_name(name_in_mesh(model.name)): model.size_mib for model in state.catalog if model.size_mib is not None
    }
    gpus = () if reports.gpus is None else reports.gpus.gpus
    memory_mib = sum(gpu.memory_total_mib or 0 for gpu in gpus)
    residency.memory_mib = memory_mib or None  # 0: no GPU has said how much it has
    return residency.replace_with_report(loaded, asked_at=asked_at)
