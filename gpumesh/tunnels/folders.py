"""A private folder for the sockets of one connection."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpumesh.config import environment


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder (0700), gone afterwards with all that is in it. Raises ``GPUMeshError`` when none can be made.

    Its path is short: a Unix socket's may not be long.
    """
    folder = Path(tempfile.mkdtemp(prefix="s", dir=environment.runtime_dir()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
