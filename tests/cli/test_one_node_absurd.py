"""Absurd reports of one node beside an honest one, from the probes' parsers up to what people see: no rule, no view and
no document fails on them, and the honest node is in all of them as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gpumesh import audit
from gpumesh.audit.changes import plan_changes
from gpumesh.backends.dialects import DIALECTS
from gpumesh.bench.results.result import describe_environment
from gpumesh.cli.commands.models import _print_table
from gpumesh.cli.views import audit_rows
from gpumesh.cli.views.audit_screen import print_comparison, print_drawing
from gpumesh.cli.views.description.description import print_description
from gpumesh.cli.views.findings import print_findings
from gpumesh.cli.views.node_selection import select_nodes
from gpumesh.cli.views.safe_text import json_text
from gpumesh.cli.views.status.status_view import ViewOptions, print_status
from gpumesh.errors import ProbeError
from gpumesh.gateway.observe import exposition, gauges
from gpumesh.mesh.history import Recorder
from gpumesh.mesh.models import inventory as models_inventory
from gpumesh.mesh.models import memory_fit
from gpumesh.probes.backend import BackendReport, _down_report, _find_unusable_models
from gpumesh.probes.commands.combined_commands import CommandOutput
from gpumesh.probes.health import assess_health
from gpumesh.probes.nvidia_smi import build_gpu_report
from gpumesh.probes.server_kind import KnownKinds
from gpumesh.probes.smi_tables import FIELDS, OLD_FIELDS, PROCESS_FIELDS
from gpumesh.state import BackendPhase, BackendState, HostState, NodeState, TunnelPhase, TunnelState, compute_totals
from gpumesh.topology import BackendKind, BackendSpec, ExpectSpec, NodeSpec, Topology
from gpumesh.wire import status_from_json, status_json
from tests.absurd_answers import gpu_tables, json_bytes, make_model_entries, ollama_answers, openai_answers
from tests.cli.states import AT, gpu, healthy, mesh
from tests.status_schema import check_status_document

EXPECT = ExpectSpec("box", 1, "RTX 4090", 24564, "550.54.15", ("qwen2.5:7b",))
HONEST = healthy("honest", gpus=(gpu(),))
NAMES = HONEST.backend.models
EXAMPLES = settings(max_examples=60, suppress_health_check=list(HealthCheck))
MOST_BYTES = 8 << 20

Reports = tuple[BackendKind, Mapping[str, Any], bytes, bytes]
smi = st.sampled_from([FIELDS, OLD_FIELDS]).flatmap(lambda fields: gpu_tables(len(fields)))
reports = st.tuples(st.just(BackendKind.OLLAMA), ollama_answers(*NAMES), smi, gpu_tables(len(PROCESS_FIELDS))) | (
    st.tuples(st.just(BackendKind.OPENAI), openai_answers(*NAMES), smi, gpu_tables(len(PROCESS_FIELDS)))
)
NO_MODELS = {"/api/version": {"version": "0.12.6"}, "/api/tags": {"models": []}}


def row(**cells: str) -> bytes:
    """A row of nvidia-smi that is right but for these."""
    right = {
        "index": "0",
        "uuid": "GPU-00000000-1111",
        "name": "NVIDIA GeForce RTX 4090",
        "driver_version": "550.54.15",
    }
    changed = {name.replace("_", ".", 1) if name not in right else name: cell for name, cell in cells.items()}
    return ", ".join({**dict.fromkeys(FIELDS, "1"), **right, **changed}[field] for field in FIELDS).encode()


def observed(kind: BackendKind, answers: Mapping[str, Any], table: bytes, processes: bytes) -> NodeState:
    """A node's state as a mesh makes it of what the host and its server say."""
    dialect, spec = DIALECTS[kind], BackendSpec(kind)
    given = {name: answers.get(call.path) for name, call in dialect.probe_calls().items()}
    try:
        inventory = dialect.read_inventory(
            {name: None if document is None else (200, json_bytes(document)) for name, document in given.items()}
        )
        state = BackendState(
            kind.value,
            BackendPhase.UP,
            url="http://127.0.0.1:1",
            version=inventory.version,
            models=tuple(model.name for model in inventory.catalog),
            loaded=inventory.loaded,
            catalog=inventory.catalog,
        )
        backend = BackendReport(state, _find_unusable_models(inventory, "hostile"), "http://127.0.0.1:1", inventory)
    except ProbeError as error:
        backend = _down_report(spec, error, "hostile", KnownKinds())
    gpus = build_gpu_report(CommandOutput(0, table), CommandOutput(0, processes), hostname="box", node="hostile")
    tunnel = TunnelState("sshtunnel", TunnelPhase.UP, since=AT, rtt_ms=1.0, local_port=1)
    health, reason = assess_health(tunnel, gpus, backend, NodeSpec("hostile", spec, expect=EXPECT), False)
    return NodeState(
        "hostile",
        health,
        reason,
        tunnel,
        backend.state,
        HostState(gpus.hostname, gpus.driver),
        None if gpus.error is not None else gpus.gpus,
        noticed=(*gpus.findings, *backend.findings),
    )


@EXAMPLES
@given(reports)
@example((BackendKind.OLLAMA, NO_MODELS, row(utilization_gpu="200"), b""))
@example((BackendKind.OLLAMA, NO_MODELS, row(memory_total="999999999999", memory_used="-1", memory_free="1e9"), b""))
@example((BackendKind.OLLAMA, NO_MODELS, row(memory_total="0", memory_used="5", temperature_gpu="-999999"), b""))
@example((BackendKind.OLLAMA, NO_MODELS, row(power_draw="999999999999", clocks_sm="999999999999"), b""))
@example((BackendKind.OLLAMA, NO_MODELS, row(driver_version="${HOME}`id`", name="\x1b[31m[bold]red"), b""))
@example((BackendKind.OLLAMA, NO_MODELS, b"\n".join([row()] * 3 + [row(uuid=HONEST.gpus[0].uuid)]), b""))  # type: ignore[index]
@example((BackendKind.OLLAMA, NO_MODELS, row(), b"GPU-00000000-1111, 999999999999, \x1b]0;x\x07, 9" * 3))
@example((BackendKind.OLLAMA, {**NO_MODELS, "/api/ps": {"models": make_model_entries(9_000)}}, row(), b""))
@example((BackendKind.OLLAMA, {**NO_MODELS, "/api/tags": {"models": make_model_entries(9_999)}}, row(), b""))
def test_all_views_hold(capsys: Any, reported: Reports) -> None:
    hostile = observed(*reported)
    nodes = (hostile, HONEST)
    specs = (NodeSpec("hostile", BackendSpec(reported[0]), expect=EXPECT), NodeSpec("honest", BackendSpec()))
    topology = Topology("home", specs)
    findings = audit.collect_findings(topology, nodes)
    state = replace(mesh(*nodes, findings=findings), totals=compute_totals(nodes))
    # documents
    text = json.dumps(status_json(state), ensure_ascii=False, allow_nan=False)
    assert len(text.encode()) < MOST_BYTES
    document = json.loads(text)
    check_status_document(document)
    assert status_from_json(document).node("honest") == HONEST
    json_text(document).encode()
    page = exposition.render(gauges.mesh_families(state, {}))
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert any(sample.labels["node"] == "honest" for sample in families["gpumesh_gpu_memory_total_bytes"])
    assert sum(map(len, families.values())) < 2000
    # what follows from it
    made = plan_changes(topology, nodes, findings)
    assert all(change.node == "hostile" for change in made if change.path != ("enabled",))
    recorder = Recorder()
    for step in range(30):
        recorder.add(replace(state, at=AT + timedelta(seconds=step)))
    json.dumps(status_json(state) | {"history": str(recorder.history())}, allow_nan=False)
    describe_environment(state, embedded=True)
    memory_fit.format_fits(memory_fit.find_largest_fits(state))
    # what people see
    for look in (ViewOptions(verbose=True), ViewOptions(height=12)):
        print_status(state, look)
    print_findings(findings)
    print_description(select_nodes(state, ["hostile"]), None)
    print_comparison(list(audit_rows.compare_nodes(topology, nodes, findings)))
    print_drawing(audit_rows.draw_topology(topology, nodes))
    rows = models_inventory.list_model_rows(state)
    assert {row.name for row in rows if "honest" in row.nodes} == set(NAMES)
    _print_table(rows[:200])
    shown = capsys.readouterr().out
    assert "honest" in shown
    assert not any(character in shown for character in "\x1b\x07\x00\u202e")
    shown.encode()
