"""From mesh.yaml's text to a ``Topology``, with all problems at once; and the only room that reads the environment.

What may not enter: the network, an inference server, a running mesh. Importing this room stays cheap: a command that
only needs to know *which* file it is about (`status` on a running mesh) pays for neither yaml nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpumesh.config.credentials import read_secret, withhold_variables
from gpumesh.config.locate import (
    find_config,
    is_loopback,
    parse_listen_address,
    parse_listen_option,
    require_key_beyond_loopback,
    search_paths,
)
from gpumesh.topology import Topology

if TYPE_CHECKING:
    from gpumesh.config.specs import ResolveAlias
    from gpumesh.state import Finding

__all__ = [
    "check",
    "dump_effective",
    "find_config",
    "is_loopback",
    "load",
    "parse",
    "parse_listen_address",
    "parse_listen_option",
    "read_secret",
    "require_key_beyond_loopback",
    "schema",
    "search_paths",
    "withhold_variables",
]


def load(path: Path | None = None) -> Topology:
    """Finds, reads and checks mesh.yaml. Raises UsageError when there is none, ConfigError with all that is wrong."""
    from gpumesh.config import reader

    return reader.load(find_config(path))


def parse(
    text: str,
    *,
    file: str,
    env: Mapping[str, str],
    home: Path,
    source: Path | None = None,
    resolve_alias: ResolveAlias | None = None,
) -> Topology:
    """As ``load``, without touching files or the environment. ``source`` is the file's own absolute path: relative
    paths in it start from its folder. Without ``resolve_alias`` an ``alias`` is taken for a host's name.

    Raises ConfigError with all that is wrong.
    """
    from gpumesh.config import reader

    return reader.parse(text, file=file, env=env, home=home, source=source, resolve_alias=resolve_alias)


def check(topology: Topology) -> list[Finding]:
    """What is right in form, and will probably not work from here: `config check` says it, nothing else does."""
    from gpumesh.config import advice

    return advice.check(topology)


def dump_effective(topology: Topology) -> str:
    """The topology as YAML, every default written out; anything secret that got into it is masked."""
    from gpumesh.config import show

    return show.dump_effective(topology)


def schema() -> dict[str, Any]:
    """A JSON Schema of mesh.yaml, for editors."""
    from gpumesh.config import model

    return model.schema()
