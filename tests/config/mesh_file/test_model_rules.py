"""The sections that name models, nodes and keys, read from text as a person writes them."""

from __future__ import annotations

import hashlib
import time

import pytest

from gpumesh import config
from gpumesh.backends.continuation.stream_formats import generates_text
from gpumesh.config.mesh_file.model_rules import QUEUED_ROUTES
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.topology import HEARTBEAT_S, KeySpec, ModelSpec, Priority, RequestRate
from tests.config.build import HOME, problem, problems, topology

NODES = """nodes:
- {name: iceland, backend: {url: "http://h:1"}}
- {name: local, backend: {url: "http://h:2"}, tier: 2}
"""
DIGEST = hashlib.sha256(b"secret").hexdigest()


def models(text: str) -> tuple[ModelSpec, ...]:
    return topology(f"{NODES}models:\n{text}").models


def test_all_keys_of_a_model() -> None:
    assert models(
        "  qwen2.5:7b:\n    nodes: [iceland, local]\n    prefer: local\n    copies: 1\n    pinned: true\n"
        "    context_steps: [4096, 16384]\n    aliases: [gpt-4o-mini]\n    fallback: llama3.2\n"
    ) == (
        ModelSpec("qwen2.5:7b", ("iceland", "local"), ("local",), 1, True, (4096, 16384), ("gpt-4o-mini",), "llama3.2"),
    )


@pytest.mark.parametrize(
    ("rules", "nodes", "wanted_copies"),
    [
        ("", None, None),
        ("{}", None, None),
        ("{nodes: all}", None, 2),
        ("{nodes: all, copies: 1}", None, 1),
        ("{nodes: local}", ("local",), 1),
        ("{nodes: [iceland, local]}", ("iceland", "local"), 2),
        ("{nodes: [iceland, local], copies: 1}", ("iceland", "local"), 1),
        ("{copies: 2}", None, 2),
        ("{pinned: true}", None, 1),
    ],
)
def test_where_a_model_should_be(rules: str, nodes: tuple[str, ...] | None, wanted_copies: int | None) -> None:
    (spec,) = models(f"  m: {rules}\n")
    assert (spec.nodes, spec.wanted_copies) == (nodes, wanted_copies)


def test_a_node_has_a_tier_of_its_own_or_by_default() -> None:
    assert [node.tier for node in topology(f"{NODES}defaults: {{tier: 3}}\n").nodes] == [3, 2]
    assert [node.tier for node in topology(NODES).nodes] == [1, 2]


def test_the_rent_of_a_node_is_unknown_unless_it_is_given() -> None:
    assert [node.eur_per_hour for node in topology(NODES).nodes] == [None, None]
    text = NODES.replace("tier: 2", "eur_per_hour: 0") + "defaults: {eur_per_hour: 0.34}\n"
    assert [node.eur_per_hour for node in topology(text).nodes] == [0.34, 0.0]


def test_keys_and_the_priority_of_routes() -> None:
    gateway = topology(
        f"{NODES}gateway:\n  route_priority: {{/api/embed: batch}}\n  keys:\n"
        f"  - {{name: chat, env: CHAT_KEY, priority: interactive}}\n"
        f"  - {{name: night, hash: {DIGEST.upper()}, nodes: local, models: [m]}}\n"
    ).gateway
    assert gateway.keys == (
        KeySpec("chat", env="CHAT_KEY", priority=Priority.INTERACTIVE),
        KeySpec("night", sha256=DIGEST, nodes=("local",), models=("m",)),
    )
    assert dict(gateway.route_priority) == {"/api/embed": Priority.BATCH}
    assert gateway.key_variables == ("CHAT_KEY",)
    assert gateway.needs_key


@pytest.mark.parametrize(
    ("rate", "requests", "period_s"),
    [("60", 60, 60.0), ("60/m", 60, 60.0), ("10 / s", 10, 1.0), ("1000/h", 1000, 3600.0), ("5000/d", 5000, 86400.0)],
)
def test_the_rate_of_a_key(rate: str, requests: int, period_s: float) -> None:
    mesh = topology(f"{NODES}gateway: {{keys: [{{name: a, file: key.txt, rate: {rate}}}]}}\n")
    (key,) = mesh.gateway.keys
    assert key.rate == RequestRate(requests, period_s)
    assert key.file is not None
    assert key.file.name == "key.txt"
    assert config.parse(config.dump_effective(mesh), file="x", env={}, home=HOME, source=mesh.source).gateway.keys == (
        key,
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("2000000", 2_000_000), ("2_000_000", 2_000_000), ("500k", 500_000), ("1.5M", 1_500_000), ("1G", 10**9)],
)
def test_the_budget_of_a_key(text: str, tokens: int) -> None:
    (key,) = topology(f"{NODES}gateway: {{keys: [{{name: a, env: A, tokens_per_month: {text}}}]}}\n").gateway.keys
    assert key.tokens_per_month == tokens


def test_the_heartbeat_of_routes() -> None:
    gateway = topology(f"{NODES}gateway: {{heartbeat: {{/v1/messages: off, /api/chat: 30s}}}}\n").gateway
    assert gateway.heartbeat_s == {**HEARTBEAT_S, "/v1/messages": 0.0, "/api/chat": 30.0}
    mesh = topology(f"{NODES}gateway: {{heartbeat: {{/v1/messages: off, /api/chat: 30s}}}}\n")
    assert config.parse(config.dump_effective(mesh), file="x", env={}, home=HOME, source=mesh.source).gateway == gateway


def test_streams_of_all_routes_that_generate_text_can_have_a_heartbeat() -> None:
    assert set(HEARTBEAT_S) == {path for path in MODEL_ROUTES if generates_text(path)}


def test_a_key_is_a_secret_that_no_program_gets() -> None:
    mesh = topology(f"{NODES}gateway: {{api_key_env: A, keys: [{{name: b, env: B}}]}}\n")
    assert mesh.secret_variables == {"A", "B"}


def test_a_key_of_its_own_is_enough_beyond_loopback() -> None:
    mesh = topology(f"{NODES}gateway: {{listen: '0.0.0.0:1', keys: [{{name: b, env: B}}]}}\n")
    assert mesh.gateway.host == "0.0.0.0"


def test_what_is_in_effect_can_be_read_back() -> None:
    mesh = topology(
        f"{NODES}models:\n"
        f"  a: {{nodes: all, aliases: [x, y], fallback: b}}\n  b: {{nodes: local, prefer: local}}\n  c:\n"
        f"gateway:\n  route_priority: {{/v1/messages: interactive}}\n"
        f"  keys: [{{name: k, env: K, models: a}}, {{name: l, hash: {DIGEST}, nodes: local, priority: batch}}]\n"
    )
    text = config.dump_effective(mesh)
    assert config.parse(text, file="x", env={}, home=HOME) == mesh


@pytest.mark.parametrize(
    ("rules", "line", "where", "said"),
    [
        ("m: {nodes: []}", 5, "models.m.nodes", "names no node"),
        ("m: {nodes: [icland]}", 5, "models.m.nodes[0]", "there is no node 'icland'; did you mean iceland?"),
        ("m: {nodes: zzz}", 5, "models.m.nodes", "there is no node 'zzz'; the nodes are: iceland, local"),
        ("m: {nodes: [local, all]}", 5, "models.m.nodes[1]", "all stands alone"),
        ("m: {nodes: [local, local]}", 5, "models.m.nodes[1]", "'local' stands here already"),
        ("m: {nodes: local, prefer: iceland}", 5, "models.m.prefer", "'iceland' is none of the model's nodes"),
        ("m: {copies: 3}", 5, "models.m.copies", "3 copies need as many nodes, and the model may use 2 nodes"),
        ("m: {nodes: local, copies: 2, pinned: true}", 5, "models.m.copies", "may use 1 node"),
        ("m: {copies: 0}", 5, "models.m.copies", "is not between 1 and 4096"),
        ("m: {context_steps: []}", 5, "models.m.context_steps", "names no context"),
        ("m: {context_steps: [8192, 4096]}", 5, "models.m.context_steps[1]", "4096 does not rise: it follows 8192"),
        ("m: {context_steps: [8192, 8192]}", 5, "models.m.context_steps[1]", "8192 does not rise"),
        ("m: {context_steps: [0]}", 5, "models.m.context_steps[0]", "is not between 1 and"),
        ("m: {context_steps: [-1]}", 5, "models.m.context_steps[0]", "is not between 1 and"),
        ("m: {aliases: []}", 5, "models.m.aliases", "names no model"),
        ("m: {aliases: M:latest}", 5, "models.m.aliases", "'M:latest' is the model's own name"),
        ("m: {aliases: [a, a]}", 5, "models.m.aliases[1]", "'a' is an alias of m already"),
        ("m: {aliases: [n]}\n  n:", 5, "models.m.aliases[0]", "'n' is another model of this file"),
        ("m: {aliases: [a]}\n  n: {aliases: [A]}", 6, "models.n.aliases[0]", "'A' is an alias of m already"),
        ("m:\n  M:latest:", 6, "models.M:latest", "is the same model as 'm'"),
        ("m: {fallback: m}", 5, "models.m.fallback", "is the model itself"),
        ("m: {aliases: a, fallback: a}", 5, "models.m.fallback", "is the model itself"),
        ("m: {fallback: n}\n  n: {fallback: m}", 5, "models.m.fallback", "falls back in a circle: m → n → m"),
        ("m: {falback: n}", 5, "models.m.falback", "unknown key 'falback'; did you mean fallback?"),
        ("m: {priority: batch}", 5, "models.m.priority", "unknown key 'priority'; priority belongs under a key of"),
        ("m: 3", 5, "models.m", "keys with values are expected here"),
    ],
)
def test_problems_of_models(rules: str, line: int, where: str, said: str) -> None:
    text = problem(f"{NODES}models:\n  {rules}\n")
    assert text.startswith(f"mesh.yaml:{line}:")
    assert where in text
    assert said in text


def test_a_chain_that_leads_into_a_circle_is_reported_once() -> None:
    (only,) = problems(f"{NODES}models:\n  a: {{fallback: b}}\n  b: {{fallback: c}}\n  c: {{fallback: b}}\n")
    assert "models.b.fallback" in only


@pytest.mark.parametrize(
    ("keys", "where", "said"),
    [
        ("[]", "gateway.keys", "names no key"),
        ("[{name: a}]", "gateway.keys[0]", "says neither `env`, `file` nor `hash`"),
        (f"[{{name: a, env: A, hash: {DIGEST}}}]", "gateway.keys[0].hash", "env stands here already"),
        ("[{name: a, env: A}, {name: a, env: B}]", "gateway.keys[1].name", "is that of gateway.keys[0] already"),
        ("[{name: a, env: A}, {name: b, env: A}]", "gateway.keys[1].env", "is that of gateway.keys[0] already"),
        ("[{name: a, env: OWN}]", "gateway.keys[0].env", "is that of gateway.api_key_env already"),
        (
            f"[{{name: a, hash: {DIGEST}}}, {{name: b, hash: {DIGEST.upper()}}}]",
            "gateway.keys[1].hash",
            "is that of gateway.keys[0] already",
        ),
        ("[{name: a, hash: sk-hunter2}]", "gateway.keys[0].hash", "64 hexadecimal digits, not the key itself"),
        (
            f"[{{name: a, hash: {hashlib.sha256(b'').hexdigest()}}}]",
            "gateway.keys[0].hash",
            "the hash of an empty text",
        ),
        ("[{name: a, env: sk-hunter2}]", "gateway.keys[0].env", "not the secret itself"),
        ("[{name: a, env: A, nodes: [icland]}]", "gateway.keys[0].nodes[0]", "did you mean iceland?"),
        ("[{name: a, env: A, nodes: []}]", "gateway.keys[0].nodes", "names no node"),
        ("[{name: a, env: A, models: []}]", "gateway.keys[0].models", "names no model"),
        ("[{name: a, env: A, priority: high}]", "gateway.keys[0].priority", "'high' is not one of"),
        ("[{name: a, env: A, file: f}]", "gateway.keys[0].file", "env stands here already: give one of env, file and"),
        (
            "[{name: a, file: f}, {name: b, file: f}]",
            "gateway.keys[1].file",
            "is that of gateway.keys[0] already",
        ),
        ("[{name: a, env: A, rate: 0}]", "gateway.keys[0].rate", "allows no request"),
        ("[{name: a, env: A, rate: 3/w}]", "gateway.keys[0].rate", "is not a rate: write 60 for 60 requests"),
        ("[{name: a, env: A, rate: [3]}]", "gateway.keys[0].rate", "a single value is expected"),
        (
            "[{name: a, env: A, tokens_per_month: lots}]",
            "gateway.keys[0].tokens_per_month",
            "write 2000000, 500k or",
        ),
        ("[{name: a, env: A, tokens_per_month: 0}]", "gateway.keys[0].tokens_per_month", "is not between 1 and"),
        ("[{name: a, env: A, limit: 0}]", "gateway.keys[0].limit", "unknown key 'limit'"),
    ],
)
def test_problems_of_keys(keys: str, where: str, said: str) -> None:
    text = problem(f"{NODES}gateway:\n  api_key_env: OWN\n  keys: {keys}\n")
    assert where in text
    assert said in text
    assert "hunter2" not in text


def test_a_key_that_stands_in_the_file_is_not_shown() -> None:
    told = problems(f"{NODES}gateway: {{keys: [{{name: a, key: sk-hunter2}}]}}\n")
    assert any("put it into a variable, and the variable's name under env" in text for text in told)
    assert not any("hunter2" in text for text in told)


def test_problems_of_routes() -> None:
    assert "did you mean /v1/messages?" in problem(f"{NODES}gateway: {{heartbeat: {{/v1/message: 10s}}}}\n")
    assert "is not between 2s and 5m" in problem(f"{NODES}gateway: {{heartbeat: {{/v1/messages: 1s}}}}\n")
    assert "did you mean /api/embed?" in problem(f"{NODES}gateway: {{route_priority: {{/api/embd: batch}}}}\n")
    assert "is not one of interactive, normal, batch" in problem(
        f"{NODES}gateway: {{route_priority: {{/api/embed: low}}}}\n"
    )


def test_a_class_can_be_set_for_each_route_that_waits() -> None:
    assert set(QUEUED_ROUTES) == {path for path, route in MODEL_ROUTES.items() if route.needs_slot}


def test_the_largest_file_is_checked_quickly() -> None:
    """It takes a second if each model, alias and node is looked at once, and minutes if all pairs are."""
    chain = "".join(f"  m{n}: {{fallback: m{n + 1}}}\n" for n in range(3000))
    aliases = ", ".join(f"a{n}" for n in range(5000))
    names = ", ".join(["local"] * 1000)
    text = f"{NODES}models:\n{chain}  x: {{aliases: [{aliases}]}}\n  y: {{nodes: [{names}]}}\n"
    began = time.process_time()
    assert len(problems(text)) == 100 + 1, "only the repeated nodes are problems, of which some are shown"
    assert time.process_time() - began < 20
