"""Reads the configuration: turns mesh.yaml into a ``Topology`` (``mesh_file``), and reads the environment variables.

All problems of a mesh.yaml are reported at once. No other room reads the environment.

Not allowed here: the network, an inference server, a running mesh. Importing this room stays cheap: a command that only
needs to know *which* file is meant (`status` on a running mesh) does not import yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpumesh.config.credentials import read_secret, read_secret_file, withhold_variables
from gpumesh.config.find_file import find_config, search_paths
from gpumesh.config.listen_address import parse_listen_address, parse_listen_option, require_key_beyond_loopback
from gpumesh.text.addresses import is_loopback
from gpumesh.topology import Topology

if TYPE_CHECKING:
    from gpumesh.config.mesh_file.topology_builder import ResolveAlias
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
    "read_secret_file",
    "require_key_beyond_loopback",
    "schema",
    "search_paths",
    "withhold_variables",
]


def load(path: Path | None = None) -> Topology:
    """Finds, reads and checks mesh.yaml, and returns its topology.

    Raises UsageError when there is no mesh.yaml, and ConfigError with all problems of the file.
    """
    from gpumesh.config.mesh_file import reader

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
    """Returns the topology of a mesh.yaml with this text, without reading files or the environment.

    ``file`` is the file's name in messages. ``env`` has the variables for ``${VAR}``, and ``home`` is the folder for
    ``~``. ``source`` is the absolute path of the file: relative paths in the text start from its folder. Without
    ``resolve_alias`` an ``alias`` is used as the host's name. Raises ConfigError with all problems.
    """
    from gpumesh.config.mesh_file import reader

    return reader.parse(text, file=file, env=env, home=home, source=source, resolve_alias=resolve_alias)


def check(topology: Topology) -> list[Finding]:
    """Returns findings about a valid topology: what will probably not work on this machine. Only `config check` shows
    them."""
    from gpumesh.config import advice

    return advice.check(topology)


def dump_effective(topology: Topology) -> str:
    """Returns the topology as YAML with every default written out. Secrets in the text are masked."""
    from gpumesh.config import show

    return show.dump_effective(topology)


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of mesh.yaml, for editors."""
    from gpumesh.config.mesh_file import json_schema

    return json_schema.make_json_schema()
