from __future__ import annotations

from typing import Any

import pytest

from gpumesh.config.editing.key_values import read_edits
from gpumesh.errors import UsageError


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("ssh.port=17446", ("ssh", "port"), 17446),
        ("weight=0.5", ("weight",), 0.5),
        ("enabled=false", ("enabled",), False),
        ("name=pod", ("name",), "pod"),
        ("expect.models=[qwen2.5:7b, a]", ("expect", "models"), ("qwen2.5:7b", "a")),
        ("backend.url=http://127.0.0.1:1/a=b", ("backend", "url"), "http://127.0.0.1:1/a=b"),
        ("labels.zone.name=2", ("labels", "zone.name"), "2"),
        ("expect.gpu=NVIDIA: [x", ("expect", "gpu"), "NVIDIA: [x"),
        ("expect.driver=2026-01-02", ("expect", "driver"), "2026-01-02"),
    ],
)
def test_values_are_read_as_in_the_file(word: str, path: tuple[str, ...], value: Any) -> None:
    (edit,) = read_edits([word])
    assert (edit.path, edit.value) == (path, value)
    assert type(edit.value) is type(value)


@pytest.mark.parametrize(
    "word", ["weight", "=1", "a..b=1", ".=1", "a b=1", "ssh={port: 1}", "expect=", "name=a\nb", "x=~"]
)
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(UsageError):
        read_edits([word])
