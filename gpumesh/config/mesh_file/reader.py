"""Reads a mesh.yaml from the file to the ``Topology``, through all steps: YAML, variables, rules, schema, specs.

Each step reports all its problems, in one ConfigError.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gpumesh.config import credentials, environment, find_file
from gpumesh.config.mesh_file import error_messages, rules, yaml_tree
from gpumesh.config.mesh_file.file_schema import MeshFile
from gpumesh.config.mesh_file.topology_builder import ResolveAlias, TopologyBuilder
from gpumesh.config.mesh_file.value_types import SectionOf, ValueProblem
from gpumesh.config.mesh_file.variable_expansion import expand_tree
from gpumesh.config.mesh_file.yaml_tree import Fault, MappingValue, Value
from gpumesh.config.ssh import default_keys, ssh_config
from gpumesh.errors import ConfigError, Problem
from gpumesh.topology import Topology

MAX_BYTES = 4 * yaml_tree.MAX_CHARACTERS  # a character of UTF-8 has 4 bytes at most
MAX_PROBLEMS = 100  # in one ConfigError


def load(path: Path) -> Topology:
    """Reads the mesh.yaml at ``path`` and returns its topology. Raises ConfigError."""
    return parse_file_text(read_text(path, find_file.display_path(path)), path)


def parse_file_text(text: str, path: Path) -> Topology:
    """Returns the topology that the file at ``path`` would give with this text. Raises ConfigError."""
    home = environment.home()
    return parse(
        text,
        file=find_file.display_path(path),
        env=environment.variables(),
        home=home,
        source=path,
        resolve_alias=lambda alias: ssh_config.resolve_alias(alias, home=home),
        identities=default_keys.find_default_keys(home),
        withhold_secrets=credentials.withhold_variables,
    )


def read_text(path: Path, file: str) -> str:
    """Returns the text of the file at ``path``. ``file`` is the file's name in messages. Raises ConfigError.

    Only a regular file is read, up to a maximum size: a pipe or a device could block for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError((Problem("is not a file that can be read as text", file),))
            data = _read_at_most(descriptor, MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError((Problem(f"cannot be read: {reason}", file),)) from error
    if len(data) > MAX_BYTES:
        raise ConfigError((Problem(f"is larger than {MAX_BYTES // 1024} KiB, which no mesh.yaml is", file),))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # the byte order marks of UTF-16
            problem = Problem("is UTF-16: save it as UTF-8", file)
        else:
            before_error = data[: error.start].decode("utf-8")
            position = yaml_tree.position_at(before_error, len(before_error))
            message = f"byte 0x{data[error.start]:02x} is not UTF-8: save it as UTF-8"
            problem = Problem(message, file, position.line, position.column)
        raise ConfigError((problem,)) from error


def _read_at_most(descriptor: int, limit: int) -> bytes:
    """Returns the bytes up to the end of the file, at most ``limit`` bytes."""
    data = b""
    while len(data) < limit:
        piece = os.read(descriptor, limit - len(data))
        if not piece:
            break
        data += piece
    return data


def parse(
    text: str,
    *,
    file: str,
    env: Mapping[str, str],
    home: Path,
    source: Path | None = None,
    resolve_alias: ResolveAlias | None = None,
    identities: tuple[Path, ...] = (),
    withhold_secrets: Callable[[Collection[str]], None] = lambda _: None,
) -> Topology:
    """Returns the topology of a mesh.yaml with this text. Pure if the two callbacks are pure. Raises ConfigError.

    ``file``, ``source`` and ``resolve_alias`` are as for ``config.parse``; ``identities`` are the key files that ssh
    tries by default. ``withhold_secrets`` gets the names of the variables that the file names for secrets. It is called
    before ``resolve_alias``, which may start a program.
    """
    tree, faults = _parse_mapping(text, file)
    values, expansion_faults = expand_tree(tree, env)
    faults += expansion_faults
    # The rules come before the schema: a broken rule takes precedence over the schema's problem with the same key.
    broken_rules = [Fault(message, None, path) for path, message in rules.find_broken_rules(values)]
    reported_paths = {fault.path for fault in faults}
    faults += [fault for fault in broken_rules if fault.path not in reported_paths]
    mesh_file = _read_sections(values, tree, faults)
    if mesh_file is None or faults:  # the schema accepts a file with a duplicate key or a broken rule
        raise _make_error(faults, file, tree)
    withhold_secrets(_secret_variables(values))
    builder = TopologyBuilder(
        user=env.get("LOGNAME") or env.get("USER") or "root",
        home=home,
        base=source.parent if source is not None else Path(file).parent,
        resolve_alias=resolve_alias,
        identities=identities,
    )
    topology = builder.build_topology(mesh_file, source)
    if builder.faults:
        raise _make_error(builder.faults, file, tree)
    return topology


def _parse_mapping(text: str, file: str) -> tuple[MappingValue, list[Fault]]:
    """Returns the tree of a mesh.yaml, and its faults. Raises ConfigError when the text is no mapping at all."""
    tree, faults = yaml_tree.parse_yaml(text)
    is_null = isinstance(tree, yaml_tree.ScalarValue) and tree.text is None  # only comments, or `---`
    if tree is None or is_null:
        hint = None
        if not faults:  # otherwise the text is not YAML, as the faults say
            faults = [Fault("is empty")]
            hint = "`gpumesh init` writes one; the shortest has a list `nodes` with one `name` and how to reach it"
        raise _make_error(faults, file, None, hint)
    if not isinstance(tree, MappingValue):
        faults.append(Fault("keys with values are expected at the top, such as `nodes:`", tree.position))
        raise _make_error(faults, file, tree)
    return tree, faults


def _read_sections(values: Any, tree: Value, faults: list[Fault]) -> MeshFile | None:
    """Returns the file as the sections of the schema. If it breaks the schema, adds the new problems to ``faults``, and
    returns ``None``."""
    problems: list[ValueProblem] = []
    mesh_file = SectionOf(MeshFile).read(values, (), problems)
    reported_paths = {fault.path for fault in faults}
    faults += [fault for fault in error_messages.explain_problems(problems, tree) if fault.path not in reported_paths]
    return mesh_file


def _secret_variables(values: Any) -> set[str]:
    """Returns the names of the variables that the file names for secrets, under ``api_key_env``, ``password_env``,
    ``env`` and the like, at any depth."""
    if isinstance(values, list):
        return {name for member in values for name in _secret_variables(member)}
    names: set[str] = set()
    if isinstance(values, dict):
        for key, value in values.items():
            if _names_variable(key) and isinstance(value, str):
                names.add(value)
            names |= _secret_variables(value)
    return names


def _names_variable(key: object) -> bool:
    """Whether the value of ``key`` is the name of a variable that holds a secret."""
    return isinstance(key, str) and (key == "env" or key.endswith("_env"))


def _make_error(faults: list[Fault], file: str, tree: Value | None, hint: str | None = None) -> ConfigError:
    """Returns the error with these faults in the order of the file, ``MAX_PROBLEMS`` at most.

    A fault without a position gets the position of its path in ``tree``.
    """
    problems = []
    for fault in faults:
        position = fault.position
        if position is None and fault.path and tree is not None:  # without a path: a fault of the whole file
            _, position, _ = yaml_tree.follow_path(tree, fault.path)
        line, column = _line_and_column(position)
        problems.append(Problem(fault.message, file, line, column, yaml_tree.format_path(fault.path)))
    problems.sort(key=lambda problem: (problem.line or 0, problem.column or 0))  # those without a position come first
    if len(problems) > MAX_PROBLEMS:
        remaining = len(problems) - MAX_PROBLEMS
        problems = [*problems[:MAX_PROBLEMS], Problem(f"and {remaining} more problems", file)]
    return ConfigError(tuple(problems), hint=hint)


def _line_and_column(position: yaml_tree.Position | None) -> tuple[int | None, int | None]:
    """Returns the line and the column of ``position``; ``None`` for both if there is no position."""
    return (position.line, position.column) if position is not None else (None, None)
