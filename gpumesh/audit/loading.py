"""The audit's rule about loads of models: whether a node spends its time on loading models again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpumesh.state import Finding, LoadingState, ModelLoadsState, NodeState, Severity, TunnelPhase
from gpumesh.text.sentences import join_all, join_some
from gpumesh.topology import NodeSpec

# Fewer loads are no fault: the first loads after a start, or a change of the model from time to time.
LEAST_LOADS = 4
# The scheduler lets a model that has requests stay for at least twice the time that its load took (``LEAST_STAY`` in
# balancer/forecast.py). So even a node that always loads the next model after that spends only a third of its time on
# loads. It must be found too, so the limit is below a third.
LEAST_SHARE = 0.2
MAX_NAMED = 4  # a message names at most so many models or contexts, and counts the others


def check(spec: NodeSpec, state: NodeState) -> Iterator[Finding]:
    """Yields ``thrashing`` if the node has spent much of the last minutes on loads, and has loaded a model again."""
    loading = state.loading
    if loading is None or state.tunnel.state is not TunnelPhase.UP or not is_thrashing(loading):
        return
    models = find_alternating_models(loading)
    message, hint = _describe_models(models) if len(models) > 1 else _describe_single_model(models[0])
    share_pct = 100.0 * loading.load_s / loading.window_s
    figures = f"{loading.loads} loads in the last {loading.window_s:.0f} s, {share_pct:.0f} % of its time"
    yield Finding(
        "thrashing", Severity.WARNING, spec.name, f"loads models again and again ({figures}): {message}", hint
    )


def is_thrashing(loading: LoadingState) -> bool:
    """Whether there were many loads, some of them of a model that was loaded before, and they took much of the time."""
    has_loaded_again = any(model.loads > 1 for model in loading.models)
    takes_much_time = loading.load_s >= LEAST_SHARE * max(loading.window_s, 1.0)  # just started: as if 1 s had passed
    return loading.loads >= LEAST_LOADS and has_loaded_again and takes_much_time


def find_alternating_models(loading: LoadingState) -> Sequence[ModelLoadsState]:
    """The models that were loaded more than once; the most often loaded first. Not empty if the node is thrashing."""
    loaded_again = [model for model in loading.models if model.loads > 1]
    return sorted(loaded_again, key=lambda model: (-model.loads, model.name))


def _describe_models(models: Sequence[ModelLoadsState]) -> tuple[str, str]:
    """The message and the hint for models that push each other out."""
    names = [model.name for model in models]
    shown = join_all(names) if len(names) <= MAX_NAMED else join_some(names, MAX_NAMED)
    hint = (
        "give each nodes of its own (`models:` in mesh.yaml, `nodes` of each model), or say with `copies` on how many "
        "nodes it stays; where the memory is large enough for all, raise OLLAMA_MAX_LOADED_MODELS on the host"
    )
    return f"{shown} push each other out", hint


def _describe_single_model(model: ModelLoadsState) -> tuple[str, str]:
    """The message and the hint for one model that was loaded several times, with one context or several.

    The ``None`` among its contexts stands for requests without ``num_ctx``.
    """
    numbers = sorted(context for context in model.contexts if context is not None)
    if len(model.contexts) < 2:
        return (
            f"{model.name} goes out of its memory again and again",
            "see on the host what unloads it: another program that uses the server or the GPU (`ollama ps`, "
            "`nvidia-smi`), or requests with `keep_alive: 0`, or with other options for the load (`num_batch`, "
            "`num_gpu`)",
        )
    contexts = [f"{context:,}" for context in numbers]
    if len(numbers) < len(model.contexts):
        contexts.append("none")
    shown = join_all(contexts) if len(contexts) <= MAX_NAMED else join_some(contexts, MAX_NAMED)
    hint = (
        f"under `models:` in mesh.yaml, context_steps: [{numbers[-1]}] of this model rounds them up to one context, so "
        "that clients share one load"
    )
    if len(numbers) < len(model.contexts):
        hint += "; a request without `num_ctx` gets the server's own, so let that be the same (OLLAMA_CONTEXT_LENGTH)"
    return f"{model.name} is asked for with different `num_ctx` in turn ({shown})", hint
