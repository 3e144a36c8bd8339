"""The audit's rules about a node's inference server: does it serve, on the GPU, as fast as before; is it too old."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpumesh.audit.catalog import explain
from gpumesh.backends.dialects import find_dialect
from gpumesh.state import (
    BackendPhase,
    BackendState,
    Finding,
    LoadedModel,
    NodeState,
    Severity,
    SlownessState,
    TunnelPhase,
)
from gpumesh.text.sentences import join_some
from gpumesh.text.versions import version_key
from gpumesh.topology import NodeSpec

MAX_NAMED = 4  # a message names at most so many models, and counts the others


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields the findings about the server of a node whose tunnel is up. No finding while the tunnel is not up."""
    backend, node = state.backend, spec.name
    if state.tunnel.state is not TunnelPhase.UP:
        return
    if backend.state is BackendPhase.DOWN:
        code = backend.error_code or "backend-down"
        explanation = explain(code) or explain("backend-down")
        hint = None if explanation is None else explanation.remedy
        # Usually the probe itself has noticed a finding with this code (``state.noticed``), and ``drop_consequences``
        # keeps only the probe's. The finding here is for states without it: those of a mesh of an older version, or of
        # a mesh that has just started.
        yield Finding(code, Severity.ERROR, node, backend.last_error or "its server does not answer", hint)
    if backend.state is not BackendPhase.UP:
        return
    cpu_models = describe_cpu_models(backend.loaded)
    # ``()``: nvidia-smi has shown that there is no GPU. Models must then run on the CPU, and if a GPU was expected, its
    # absence has the finding gpu-missing. ``None``: the GPUs are unknown.
    has_no_gpu = state.gpus == ()
    if cpu_models is not None and not has_no_gpu:
        yield Finding(
            "backend-on-cpu",
            Severity.WARNING,
            node,
            cpu_models,
            "choose a smaller model, quantisation or `num_ctx`, or unload others; "
            "if all of it is on the CPU, the server has lost the GPU: restart it",
        )
    yield from _check_version(node, backend)
    if state.slowness is not None:
        yield Finding(
            "node-slow",
            Severity.WARNING,
            node,
            describe_slowness(state.slowness),
            "see on the host what slows it down (`nvidia-smi -q -d PERFORMANCE`, `ollama ps`, other programs); it gets "
            "fewer requests until it is faster again",
        )


def _check_version(node: str, backend: BackendState) -> Iterator[Finding]:
    """Yields ``version-old`` if the server is older than the oldest version that gpumesh works with.

    No finding if the server's version is unknown or no version, or if its kind has no oldest version.
    """
    dialect = find_dialect(backend.kind)
    if dialect is None or dialect.oldest_version is None or backend.version is None:
        return
    version, oldest = version_key(backend.version), version_key(dialect.oldest_version)
    if version is None or oldest is None:
        return
    # Only the numbers are compared: a pre-release of the oldest version is new enough.
    numbers, *_stage = version
    oldest_numbers, *_stage = oldest
    if numbers < oldest_numbers:
        yield Finding(
            "version-old",
            Severity.WARNING,
            node,
            f"{dialect.label} {backend.version} is older than {dialect.oldest_version}",
            dialect.update_hint,
        )


def describe_cpu_models(loaded: Iterable[LoadedModel]) -> str | None:
    """Returns a sentence that names the models that are not wholly on the GPU; ``None`` if there is none.

    The reason of a node's health uses the same sentence, so that a reader recognises the same fault.
    """
    descriptions: list[str] = []
    for model in loaded:
        share_pct = cpu_share_pct(model)
        if share_pct > 0:
            descriptions.append(f"{model.name} ({share_pct} %)")
    return f"runs on the CPU: {join_some(descriptions, MAX_NAMED)}" if descriptions else None


def describe_slowness(slowness: SlownessState) -> str:
    """Returns a sentence that says how much slower the node has become, with the figures that are known."""
    parts: list[str] = []
    if slowness.first_token is not None:
        parts.append(f"first token {slowness.first_token:.1f} times its usual time")
    if slowness.decode is not None:
        parts.append(f"each token {slowness.decode:.1f} times")
    figures = f" ({', '.join(parts)})" if parts else ""
    return f"answers {slowness.factor:.1f} times slower than usual{figures}, and the other nodes do not"


def cpu_share_pct(model: LoadedModel) -> int:
    """Returns how much of a loaded model is outside the GPU's memory, in percent; 0 where that is not known."""
    if not model.size_mib or model.size_vram_mib is None:
        return 0
    outside_mib = max(model.size_mib - model.size_vram_mib, 0)  # not negative, whatever the server reports
    return 100 * outside_mib // model.size_mib
