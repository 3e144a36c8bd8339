"""The packages that are installed only when they are asked for (``optional-dependencies`` in pyproject.toml).

The simulated hosts need the extra ``lab``, and ``redis:`` in mesh.yaml needs the extra ``redis``. A person who lacks
one of them gets one sentence, and the command that installs it where this gpumesh is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from gpumesh.errors import GPUMeshError
from gpumesh.text.quoting import paste_command

DISTRIBUTION = "gpumesh-cli"
PACKAGES = {"lab": "aiohttp", "redis": "redis"}  # by the name of the extra: the package that it installs


@contextmanager
def need_extra(extra: str, purpose: str) -> Iterator[None]:
    """The imports in the block need this extra. ``purpose`` is what needs it, as the subject of a sentence.

    Raises GPUMeshError if the extra's package is not installed. Any other failed import is passed on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = PACKAGES[extra]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise GPUMeshError(
            f"{purpose} needs the Python package {package}, which is not installed",
            hint=_install_command(_requirement(extra)),
        ) from error


def _requirement(extra: str) -> str:
    """The extra's package with its bounds, as ``redis<9,>=5.2``; without bounds if they are not known."""
    package = PACKAGES[extra]
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a folder, without having been installed
        lines = []
    requirements = (line.partition(";")[0].strip() for line in lines)
    return next((requirement for requirement in requirements if requirement.startswith(package)), package)


def _install_command(requirement: str) -> str:
    """The command that adds the package to the environment of this gpumesh, by the program that made the
    environment."""
    if "/pipx/venvs/" in sys.prefix:
        return paste_command(f"pipx inject {DISTRIBUTION} {{PACKAGE}}", PACKAGE=requirement)
    # An environment that uv made has no pip, but uv can install into it.
    program = "uv pip install --python {PYTHON}" if "/uv/tools/" in sys.prefix else "{PYTHON} -m pip install"
    return paste_command(f"{program} {{PACKAGE}}", PYTHON=sys.executable, PACKAGE=requirement)
