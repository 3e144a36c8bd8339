from __future__ import annotations

import pytest

from gpumesh import config
from gpumesh.errors import ConfigError
from gpumesh.topology import EventKind, NotifyFormat, NotifySpec, Topology
from tests.config.build import HOME

NODES = "nodes: [{name: a, backend: {url: 'http://127.0.0.1:1'}}]\n"


def parse(text: str) -> Topology:
    return config.parse(NODES + text, file="mesh.yaml", env={}, home=HOME)


def test_a_rule_for_each_receiver() -> None:
    rules = parse(
        "notify:\n"
        "  - {webhook: 'https://h.example/a?b=c', format: discord, on: [node-down, thrashing], quiet: 10m}\n"
        "  - {webhook_env: HOOK, token_env: TOKEN, format: ntfy, on: disk-full}\n"
        "  - {command: [~/on-call.sh, --now]}\n"
        "  - {desktop: true, quiet: 1h}\n"
    ).notify
    assert rules == (
        NotifySpec(
            webhook="https://h.example/a?b=c",
            format=NotifyFormat.DISCORD,
            on=frozenset({EventKind.NODE_DOWN, EventKind.THRASHING}),
            quiet_s=600.0,
        ),
        NotifySpec(
            webhook_env="HOOK", token_env="TOKEN", format=NotifyFormat.NTFY, on=frozenset({EventKind.DISK_FULL})
        ),
        NotifySpec(command=(str(HOME / "on-call.sh"), "--now")),
        NotifySpec(desktop=True, quiet_s=3600.0),
    )


def test_the_variables_are_secrets() -> None:
    topology = parse("notify: [{webhook_env: HOOK, token_env: TOKEN}]\n")
    assert topology.secret_variables == {"HOOK", "TOKEN"}
    assert [finding.code for finding in config.check(topology)].count("secret-missing") == 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{on: [node-down]}", "notify[0]: says nobody to tell"),
        ("{desktop: false}", "notify[0]: says nobody to tell"),
        ("{desktop: true, webhook: 'https://h.example'}", "notify[0].desktop: webhook stands here already"),
        ("{desktop: true, format: slack}", "notify[0].format: is for webhooks, and this rule has desktop"),
        ("{command: [x], token_env: T}", "notify[0].token_env: is for webhooks, and this rule has command"),
        ("{desktop: true, on: [node-gone]}", "'node-gone' is not one of node-down, node-up"),
        ("{webhook: 'ftp://h.example'}", "is not a URL: write it like https://example.org/hook"),
        ("{webhook: 'https://u:hunter2@h.example/x'}", "holds a user or password"),
        ("{desktop: true, quiet: 5}", "quiet"),
        ("{desktop: true, silent: 5m}", "unknown key 'silent'"),
    ],
)
def test_a_wrong_rule(rule: str, message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        parse(f"notify: [{rule}]\n")
    assert message in str(wrong.value)
    assert "hunter2" not in str(wrong.value)


def test_what_is_shown_hides_the_path_of_a_webhook() -> None:
    topology = parse("notify: [{webhook: 'https://hooks.slack.com/services/T0/B0/s3cret', format: slack}]\n")
    text = config.dump_effective(topology)
    assert "https://hooks.slack.com/********" in text
    assert "s3cret" not in text
    plain = parse("notify: [{webhook_env: HOOK, on: [node-up]}, {command: [x, y]}, {desktop: true}]\n")
    assert config.parse(config.dump_effective(plain), file="x", env={}, home=HOME).notify == plain.notify
