from __future__ import annotations

import pytest

from gpumesh.config.mesh_file.error_messages import did_you_mean, keys_at, not_one_of, quote_value
from gpumesh.errors import ConfigError
from tests.config.build import topology


def said(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        topology(text)
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


def node(keys: str) -> str:
    return f"nodes: [{{name: a, backend: {{url: 'http://h:1'}}, {keys}}}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (node("weigth: 2"), "nodes[0].weigth: unknown key 'weigth'; did you mean weight?"),
        (node("tags: {}"), "nodes[0].tags: unknown key 'tags'; did you mean labels?"),
        (node("listen: x"), "nodes[0].listen: unknown key 'listen'; listen belongs under gateway or tunnels"),
        (node("Weight: 2"), "nodes[0].Weight: unknown key 'Weight'; did you mean weight?"),
        (node("weight: []"), "nodes[0].weight: a number is expected here, not a list"),
        (node("weight: heavy"), "nodes[0].weight: 'heavy' is not a number"),
        (node("enabled: maybe"), "nodes[0].enabled: 'maybe' is neither true nor false"),
        (node("expect: 5"), "nodes[0].expect: keys with values are expected here, not the text '5'"),
        (node("labels: [a]"), "nodes[0].labels: keys with values are expected here, not a list"),
        (node("expect: {models: {a: b}}"), "nodes[0].expect.models: a list is expected here, not keys with values"),
        ("nodes: [{name: a, backend: {url: {host: h, port: 1}}}]",
         "nodes[0].backend.url: a single value is expected here, not keys with values"),
        (f"gateway: {{listen: [[0.0.0.0, 11430]]}}\n{node('weight: 1')}",
         "gateway.listen[0]: a single value is expected here, not a list"),
        (f"gateway: {{route_priority: {{/api/embed: ~}}}}\n{node('weight: 1')}",
         "gateway.route_priority./api/embed: a single value is expected here, not nothing"),
        (node("labels: {b c: d}"),
         "nodes[0].labels.b c: 'd' is not a name: use letters, digits, dots, hyphens and underscores, 63 at most"),
        (node("address_from: {command: ['', x]}"), "nodes[0].address_from.command: this names no program"),
        ("nodes: [{backend: {url: 'http://h:1'}}]", "nodes[0].name: is missing"),
        (f"tunnels: {{listen: sockets}}\n{node('weight: 1')}", "tunnels.listen: 'sockets' is not one of tcp, unix"),
        (f"tunnels: {{listen: unx}}\n{node('weight: 1')}",
         "tunnels.listen: 'unx' is not one of tcp, unix; did you mean unix?"),
        (f"tunnels: {{shared: true}}\n{node('weight: 1')}",
         "tunnels.shared: unknown key 'shared'; did you mean share?"),
        (f"gateway: {{listen: 'unix:'}}\n{node('weight: 1')}",
         "gateway.listen: 'unix:' names no socket: write unix:PATH, such as unix:/run/user/1000/gpumesh.sock"),
        (f"gateway: {{listen: [1, x]}}\n{node('weight: 1')}",
         "gateway.listen[1]: 'x' is not HOST:PORT, such as 127.0.0.1:11430 or [::1]:11430, nor unix:PATH"),
        (f"gateway: {{policy: adaptiv}}\n{node('weight: 1')}",
         "gateway.policy: 'adaptiv' is not one of round-robin, least-loaded, power-of-two, adaptive;"
         " did you mean adaptive?"),
    ],
)  # fmt: skip
def test_a_sentence_for_a_person(text: str, message: str) -> None:
    assert said(text) == [message]


def test_a_node_without_a_readable_name_is_a_question_mark_among_the_names() -> None:
    messages = said("nodes: [{name: [x], backend: {url: 'http://h:1'}}]\nmodels: {m: {nodes: [b]}}")
    assert messages == [
        "nodes[0].name: a single value is expected here, not a list",
        "models.m.nodes[0]: there is no node 'b'; the nodes are: ?",
    ]


@pytest.mark.parametrize("key", ["password", "passphrase", "api_key", "my_token"])
def test_a_secret_in_the_file_is_not_repeated(key: str) -> None:
    (message,) = said(f"nodes: [{{name: a, ssh: {{host: h, {key}: hunter2}}}}]")
    assert "a secret may not stand in the file" in message
    assert "hunter2" not in message


def test_guesses() -> None:
    assert did_you_mean("HOST-KEY-POLICY", ["host_key_policy", "port"]) == "host_key_policy"
    assert did_you_mean("zzz", ["port"]) is None
    assert not_one_of("x", ["a", "b"]) == "'x' is not one of a, b"
    assert len(quote_value("x" * 1000)) < 70
    assert quote_value("\x1b") == "'\\x1b'"


def test_keys_by_their_path() -> None:
    assert "listen" in keys_at(("gateway",))
    assert "port" in keys_at(("nodes", 0, "ssh"))
    assert keys_at(("nodes", 0, "nothing")) == []
