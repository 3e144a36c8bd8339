from __future__ import annotations

import pytest

from gpumesh.text.model_names import full_name


@pytest.mark.parametrize(
    ("asked", "full"),
    [
        ("qwen2.5", "qwen2.5:latest"),
        ("qwen2.5:7b", "qwen2.5:7b"),
        ("Qwen2.5:7B", "qwen2.5:7b"),
        ("host:5000/lib/m", "host:5000/lib/m:latest"),
        (" m ", "m:latest"),
        ("library/x", "x:latest"),
        ("Library/X:7b", "x:7b"),
        ("registry.ollama.ai/library/x:latest", "x:latest"),
        ("https://registry.ollama.ai/library/x", "x:latest"),
        ("registry.ollama.ai/user/x", "user/x:latest"),
        ("user/x", "user/x:latest"),
        ("hf.co/library/x", "hf.co/library/x:latest"),
        ("library/user/x", "library/user/x:latest"),
        ("library/", "library/:latest"),
    ],
)
def test_a_model_without_a_tag_is_latest(asked: str, full: str) -> None:
    assert full_name(asked) == full
    assert full_name(full) == full
