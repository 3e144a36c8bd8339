from __future__ import annotations

import pytest
import yaml

from gpumesh.config.yaml_output import dump_yaml


@pytest.mark.parametrize(
    "text",
    ["plain", "yes", "1.0", "", "a: b", "中文 é", "a\x1b[31mb", "x\u202ey", "\x9b2J", "tab\tline\nfeed", "\u2028"],
)
def test_it_reads_back_and_a_terminal_acts_on_nothing(text: str) -> None:
    document = {text: [text, {"k": text, "none": None, "number": 1.5}]}
    dumped = dump_yaml(document)
    assert yaml.safe_load(dumped) == document
    assert not any(unsafe in dumped for unsafe in ("\x1b", "\u202e", "\x9b"))


def test_letters_stay_letters() -> None:
    assert dump_yaml({"name": "中文 é"}) == "name: 中文 é\n"


def test_a_lone_surrogate_cannot_be_written() -> None:
    assert yaml.safe_load(dump_yaml({"name": "a\ud800b"})) == {"name": "a?b"}
