"""Imports go downwards only, without a circle, and what is named for one room stays there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gpumesh

PACKAGE = Path(gpumesh.__file__).parent

# A room may import from rooms with a smaller number, and from itself.
LAYERS = {
    "errors": 0,
    "text": 0,
    "files": 0,
    "event_loop": 0,
    "scheduling_state": 0,
    "gateways_state": 0,
    "pool_spec": 0,
    "topology": 1,
    "state": 1,
    "wire": 2,
    "backends": 2,
    "config": 3,
    "balancer": 3,
    "audit": 3,
    "tunnels": 4,
    "probes": 5,
    "coordination": 5,
    "mesh": 6,
    "notify": 6,
    "batches": 7,
    "gateway": 8,
    "pools": 8,
    "bench": 9,
    "daemon": 9,
    "lab": 10,
    "library": 10,
    "cli": 11,
}

# Who may import these, as the first parts of a module's name below gpumesh.
ONLY_IN = {
    "paramiko": {"tunnels", "lab"},
    "sshtunnel": {"tunnels"},
    "rich": {"cli"},
    "typer": {"cli"},
    "prompt_toolkit": {"cli"},
    "yaml": {"config"},
    "ruamel": {"config"},
    "threading": {"tunnels/blocking.py", "tunnels/forwarder.py", "tunnels/loop_thread.py"},
    "concurrent": {"tunnels/blocking.py", "tunnels/forwarder.py", "tunnels/loop_thread.py"},
}


Imports = list[ast.Import | ast.ImportFrom]


@cache
def modules() -> list[tuple[Path, Imports]]:
    """The imports of each module, wherever they are in it."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        found.append(
            (path.relative_to(PACKAGE), [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)])
        )
    return found


def imported(imports: Imports) -> Iterator[tuple[str, int]]:
    for node in imports:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        else:
            assert node.level == 0, "imports are absolute"
            yield node.module or "", node.lineno
            if node.module == "gpumesh":
                for alias in node.names:
                    yield f"gpumesh.{alias.name}", node.lineno


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def test_imports_go_downwards() -> None:
    wrong = []
    for path, imports in modules():
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        for name, line in imported(imports):
            parts = name.split(".")
            if parts[0] != "gpumesh" or len(parts) == 1 or parts[1] not in LAYERS:
                continue
            if parts[1] != room and LAYERS[parts[1]] >= LAYERS[room]:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not circles(imports_of_modules())


def test_no_room_and_no_file_beside_it_import_each_other() -> None:
    """Within each room, a sub-room counts as one thing beside the room's files: none of them imports in a circle.

    So the sub-rooms have an order too: what a sub-room needs is below it, and nothing there imports the sub-room."""
    graph = imports_of_modules()
    rooms = {".".join(path.parent.parts) for path in PACKAGE.rglob("*/__init__.py")}
    rooms = {room.removeprefix(".".join(PACKAGE.parts)).lstrip(".") for room in rooms} | {""}
    problems = []
    for room in sorted(rooms):
        depth = len(room.split(".")) + 1 if room else 1
        inside = {module for module in graph if not room or module.startswith(room + ".")}
        units: dict[str, set[str]] = {}
        for module in inside:
            unit = ".".join(module.split(".")[:depth])
            targets = {".".join(name.split(".")[:depth]) for name in graph[module] & inside}
            units.setdefault(unit, set()).update(targets - {unit})
        problems += [f"in {room or 'gpumesh'}: {' <-> '.join(circle)}" for circle in circles(units)]
    assert not problems, "\n".join(problems)


def imports_of_modules() -> dict[str, set[str]]:
    """For each module below gpumesh, by its dotted name below it, the modules that it imports anywhere in it."""
    imports_of = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): imports for path, imports in modules()
    }
    graph = {}
    for module, imports in imports_of.items():
        names = set()
        for name, _ in imported(imports):
            below = name.removeprefix("gpumesh.")
            names.add(below)
        for node in imports:
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}".removeprefix("gpumesh.") for alias in node.names}
        graph[module] = {name for name in names if name in imports_of and name != module}
    # ``from room import module`` names the room as well, whose __init__ imports nothing of it.
    return {
        module: {name for name in names if not any(other.startswith(name + ".") for other in names)}
        for module, names in graph.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one member (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                result.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return result


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_each_room_is_in_the_layers() -> None:
    rooms = {room_of(path) for path, _ in modules()} - {"__init__", "__main__"}
    assert rooms <= set(LAYERS)


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path, imports in modules():
        for name, line in imported(imports):
            allowed = ONLY_IN.get(name.split(".")[0])
            if allowed is None or path.as_posix() in allowed or room_of(path) in allowed:
                continue
            wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_config_only() -> None:
    wrong = []
    for path, _ in modules():
        text = (PACKAGE / path).read_text()
        if room_of(path) == "config" or not ("environ" in text or "getenv" in text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong, "\n".join(wrong)
