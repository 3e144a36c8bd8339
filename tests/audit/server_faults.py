"""Staged faults of inference servers: whether they serve, their models, the routes to them, the disk."""

from __future__ import annotations

from dataclasses import replace

from gpumesh import errors
from gpumesh.backends import unusable_answers
from gpumesh.errors import ProbeError
from gpumesh.probes import wrong_server
from gpumesh.state import (
    BackendPhase,
    BackendState,
    HostState,
    ModelInfo,
    SlownessState,
)
from gpumesh.topology import ExpectSpec
from tests.audit.build import (
    backend,
    direct,
    loading,
    route,
    state,
    state_with_error,
    state_with_routes,
)
from tests.audit.staged_faults import (
    ERROR,
    INFO,
    PARTLY_ON_CPU,
    WARNING,
    Fault,
    node_fault,
    on_another_machine,
    pair_fault,
    state_with_probe_error,
)

SERVER_FAULTS: dict[str, Fault] = {
    # -- the server
    "server down": node_fault(
        state_with_probe_error(
            ProbeError("nothing listens", finding_code="backend-down", hint="start the server on the host")
        ),
        "backend-down",
        ERROR,
        "nothing listens",
        "start the server",
    ),
    "server down, as an older mesh tells it": node_fault(
        state(backend=BackendState("ollama", BackendPhase.DOWN)),
        "backend-down",
        ERROR,
        "does not answer",
        "backend.port",
    ),
    "a web page on the port": node_fault(
        state_with_probe_error(
            ProbeError('a web page, "nginx"', finding_code="wrong-server", hint="point `backend.port` at it")
        ),
        "wrong-server",
        ERROR,
        "nginx",
        "backend.port",
    ),
    "HTTP to a port that speaks HTTPS": node_fault(
        state_with_probe_error(wrong_server.wrong_scheme_error("http://127.0.0.1:80")),
        "wrong-scheme",
        ERROR,
        "speaks HTTPS",
        "https://",
    ),
    "a certificate of nobody": node_fault(
        state_with_probe_error(ProbeError("self-signed", finding_code="tls-refused", hint="a known authority")),
        "tls-refused",
        ERROR,
        "self-signed",
        "authority",
    ),
    "a login page before it": node_fault(
        state_with_probe_error(ProbeError("HTTP 302, to /login", finding_code="redirected", hint="the server itself")),
        "redirected",
        ERROR,
        "302",
        "itself",
    ),
    "half a list of models": node_fault(
        state_with_probe_error(unusable_answers.broken_answer_error("half")),
        "answer-broken",
        ERROR,
        "half",
        "log on its host",
    ),
    "100,000 models": node_fault(
        state_with_probe_error(unusable_answers.too_many_models_error("more than 8 MiB")),
        "models-too-many",
        ERROR,
        "8 MiB",
        "remove",
    ),
    "redirected, as a mesh tells it that noticed no more": node_fault(
        state(backend=BackendState("ollama", BackendPhase.DOWN, last_error="302", error_code="redirected")),
        "redirected",
        ERROR,
        "302",
        "the inference server itself",
    ),
    "Host refused": node_fault(
        state_with_probe_error(ProbeError("403", finding_code="host-refused", hint="OLLAMA_HOST=0.0.0.0")),
        "host-refused",
        ERROR,
        "403",
        "OLLAMA",
    ),
    "wants a key": node_fault(
        state_with_probe_error(ProbeError("401", finding_code="key-refused", hint="`backend.api_key_env`")),
        "key-refused",
        ERROR,
        "",
        "api_key",
    ),
    "nothing listens on a direct node's port": node_fault(
        state_with_error(errors.ConnectRefused("nothing listens on 127.0.0.1:11434", hint="is it running?")),
        "backend-down",
        ERROR,
        "nothing listens",
        "running",
        replace(direct("iceland"), expect=ExpectSpec(gpus=1)),
    ),
    "half on the CPU": node_fault(
        state(backend=PARTLY_ON_CPU), "backend-on-cpu", WARNING, "llama3:70b (50 %)", "quantisation"
    ),
    "a node that has become slow": node_fault(
        replace(state(), slowness=SlownessState(2.6, 3.1, 1.2)),
        "node-slow",
        WARNING,
        "2.6 times slower than usual (first token 3.1 times its usual time, each token 1.2 times)",
        "nvidia-smi",
    ),
    "models that push each other out": node_fault(
        replace(state(), loading=loading(44.0, ("qwen2.5:14b", 5, (None,)), ("llama3.1:8b", 6, (None, 8192)))),
        "thrashing",
        WARNING,
        "(11 loads in the last 100 s, 44 % of its time): llama3.1:8b and qwen2.5:14b push each other out",
        "give each nodes of its own",
    ),
    "contexts that take turns": node_fault(
        replace(state(), loading=loading(44.0, ("qwen2.5:7b", 9, (4096, None, 16384)))),
        "thrashing",
        WARNING,
        "qwen2.5:7b is asked for with different `num_ctx` in turn (4,096, 16,384 and none)",
        "context_steps: [16384] of this model",
    ),
    "a model that others unload": node_fault(
        replace(state(), loading=loading(44.0, ("qwen2.5:7b", 9, (4096,)))),
        "thrashing",
        WARNING,
        "qwen2.5:7b goes out of its memory again and again",
        "keep_alive",
    ),
    "version too old": node_fault(
        state(backend=backend(version="0.5.1")), "version-old", WARNING, "0.5.1", "install.sh"
    ),
    # -- models
    "model missing": node_fault(
        state(backend=backend(models=("phi3",), catalog=())), "model-missing", WARNING, "qwen2.5:7b", "pull"
    ),
    "one name, two models": pair_fault(
        state(),
        on_another_machine(state(backend=backend(catalog=(ModelInfo("qwen2.5:7b", "another"),)))),
        "model-differs",
        "qwen2.5:7b is not the same",
        "ollama pull",
    ),
    "disk full": node_fault(
        state(host=HostState("af4a84245990", "550.1", store_free_mib=300)), "disk-full", WARNING, "0.3 GiB", "models rm"
    ),
    # -- the ways to the server
    "a candidate is dead": node_fault(
        state_with_routes(
            route("http://a:1"),
            route("http://b:1", state=BackendPhase.DOWN, error="http://b:1: nobody", latency_ms=None),
        ),
        "route-dead",
        INFO,
        "http://b:1: nobody",
        "backend.urls",
    ),
    "candidates are different servers": node_fault(
        state_with_routes(route("http://a:1"), route("http://b:1", store="store:2", latency_ms=1.0)),
        "routes-differ",
        WARNING,
        "http://b:1",
        "a node of each",
    ),
    "a later candidate is faster": node_fault(
        state_with_routes(route("http://a:1"), route("http://b:1", latency_ms=4.0)),
        "route-slower",
        INFO,
        "40.0 ms",
        "http://b:1 first",
    ),
    "the tunnel is slower than the network": node_fault(
        state_with_routes(
            route("http://a:1", via="sshtunnel"), route("http://10.0.0.7:80", latency_ms=1.0, offered=True)
        ),
        "route-slower",
        INFO,
        "1.0 ms",
        "no `ssh`",
    ),
    "open to the internet": node_fault(
        state_with_routes(
            route("http://a:1"), route("http://203.0.113.7:80", latency_ms=39.0, offered=True, exposed=True)
        ),
        "backend-exposed",
        WARNING,
        "whole internet",
        "OLLAMA_HOST=127.0.0.1",
    ),
}
