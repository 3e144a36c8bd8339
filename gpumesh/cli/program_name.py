"""What a person types to run this very program: ``gpumesh``, or its path where the shell does not find it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gpumesh.text.quoting import shell_word, shell_words

NAME = "gpumesh"


def program_name() -> str:
    """The words of a command line that run this installation. After `make demo` they are ``.venv/bin/gpumesh``: the
    environment is not on PATH. Another gpumesh on PATH is not this one."""
    script = Path(sys.executable).with_name(NAME)
    on_path = shutil.which(NAME)
    if not script.exists():
        return NAME if on_path else shell_words([sys.executable, "-m", NAME])
    if on_path is not None and Path(on_path).samefile(script):
        return NAME
    folder = Path.cwd()
    return shell_word(str(script.relative_to(folder) if script.is_relative_to(folder) else script))
