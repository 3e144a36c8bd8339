"""Imports go downwards only, and what is named for one room stays there (DESIGN section 10)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import gpumesh

PACKAGE = Path(gpumesh.__file__).parent

# A room may import from rooms with a smaller number, and from itself.
LAYERS = {
    "errors": 0,
    "cancellation": 0,
    "printable": 0,
    "quoting": 0,
    "atomic_file": 0,
    "versions": 0,
    "topology": 1,
    "state": 1,
    "wire": 2,
    "config": 3,
    "balancer": 3,
    "backends": 3,
    "audit": 3,
    "tunnels": 4,
    "probes": 5,
    "coordination": 5,
    "mesh": 6,
    "gateway": 7,
    "bench": 8,
    "daemon": 8,
    "lab": 9,
    "cli": 10,
}

# Who may import these, as the first parts of a module's name below gpumesh.
ONLY_IN = {
    "paramiko": {"tunnels", "lab"},
    "sshtunnel": {"tunnels"},
    "rich": {"cli"},
    "typer": {"cli"},
    "yaml": {"config"},
    "ruamel": {"config"},
    "threading": {"tunnels/blocking.py", "tunnels/forwarder.py"},
    "concurrent": {"tunnels/blocking.py", "tunnels/forwarder.py"},
}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", node.lineno
            if node.module == "gpumesh":
                for alias in node.names:
                    yield f"gpumesh.{alias.name}", node.lineno


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def test_imports_go_downwards() -> None:
    wrong = []
    for path, tree in modules():
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        for name, line in imported(tree):
            parts = name.split(".")
            if parts[0] != "gpumesh" or len(parts) == 1 or parts[1] not in LAYERS:
                continue
            if parts[1] != room and LAYERS[parts[1]] >= LAYERS[room]:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_each_room_is_in_the_layers() -> None:
    rooms = {room_of(path) for path, _ in modules()} - {"__init__", "__main__"}
    assert rooms <= set(LAYERS)


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path, tree in modules():
        for name, line in imported(tree):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is None or path.as_posix() in allowed or room_of(path) in allowed:
                continue
            wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_config_only() -> None:
    wrong = []
    for path, tree in modules():
        if room_of(path) == "config":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong, "\n".join(wrong)
