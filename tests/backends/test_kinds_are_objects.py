"""Code above the dialects asks for a capability, never which kind a server is: so a new kind is its own files only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import gpumesh
from gpumesh.topology import BackendKind

PACKAGE = Path(gpumesh.__file__).parent
# Where a kind may be named: its dialect, mesh.yaml's own words, and the stand-ins.
MAY_NAME_KINDS = ("backends", "config", "lab", "topology.py")
STARTS_A_SERVER = "pools/running/pool_node.py"  # a pool starts llama-server itself, so it knows the kind
NAMES = {kind.value for kind in BackendKind}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        below = path.relative_to(PACKAGE)
        if below.parts[0] not in MAY_NAME_KINDS and below.as_posix() != STARTS_A_SERVER:
            yield below.as_posix(), ast.parse(path.read_text())


def is_kind(node: ast.expr) -> bool:
    """``x.kind`` or ``kind``, whatever it is the kind of."""
    return (isinstance(node, ast.Attribute) and node.attr == "kind") or (
        isinstance(node, ast.Name) and node.id == "kind"
    )


def names_a_kind(node: ast.expr) -> bool:
    """A text that is the name of a kind, alone or in a collection."""
    return any(isinstance(part, ast.Constant) and part.value in NAMES for part in ast.walk(node))


def names_backend_kind(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "BackendKind") or (
        isinstance(node, ast.Attribute) and node.attr == "BackendKind"
    )


def find_problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "BackendKind":
            # AUTO is no kind of server: it says that none is known.
            if node.attr != "AUTO":
                yield node.lineno, f"names BackendKind.{node.attr}"
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            if any(map(is_kind, operands)) and any(map(names_a_kind, operands)):
                yield node.lineno, "compares a kind with its name"
            if any(names_backend_kind(part) for operand in operands for part in ast.walk(operand)):
                yield node.lineno, "compares with a member of BackendKind"


def test_no_file_above_the_dialects_names_a_kind() -> None:
    problems = [f"{path}:{line} {problem}" for path, tree in modules() for line, problem in find_problems(tree)]
    assert not problems, "\n".join(problems)


def test_what_is_looked_for_is_found() -> None:
    wrong = """
if node.kind is BackendKind.OLLAMA: pass
if node.backend.kind == "ollama": pass
if kind in ("vllm", "openai"): pass
calls = {BackendKind.VLLM: call}
"""
    assert {line for line, _ in find_problems(ast.parse(wrong))} == {2, 3, 4, 5}
    right = """
if candidate.kind in demand.kinds: pass
if spec.kind is BackendKind.AUTO: pass
if stage.kind is StageKind.NODE: pass
dialect = DIALECTS[node.kind]
"""
    assert {line for line, _ in find_problems(ast.parse(right))} == {3}
