"""The models of the tests of pools, each written once in each process of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.4 MB, eight layers. Its tokenizer reads a blank as other tokens than the model writes, so it writes none: an
    answer that was cut can be read back."""
    from tests.real import tiny_model  # numpy takes its time, and is for these tests only

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "ANSWERED", tiny_model.ANSWERED.replace(b" ", b""))
        return tiny_model.write_tiny_model(tmp_path_factory.mktemp("model") / "small.gguf", layers=8)


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """226 MiB: eight layers of 28 MiB. Half of it goes to the worker through this machine, encrypted twice."""
    from tests.real.tiny_model import write_tiny_model

    path = tmp_path_factory.mktemp("model") / "big.gguf"
    return write_tiny_model(path, layers=8, dim=1024, heads=8, feed_forward=1024, overlapping=True)
