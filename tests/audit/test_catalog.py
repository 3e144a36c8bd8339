"""Every code that is raised anywhere is explained: what it is, what it means, what to do."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gpumesh
from gpumesh import errors
from gpumesh.audit import CATALOG, explain
from gpumesh.audit.causes import CAUSES
from gpumesh.errors import GPUMeshError

PACKAGE = Path(gpumesh.__file__).parent
CODE = re.compile(r"[a-z]+(-[a-z]+)*")
# Classes and functions that take a code, and its place among their arguments.
CODE_PLACES = {"Finding": 0, "SmiFailure": 0, "Cause": 0, "Failed": 0, "Lost": 0, "ForwardFailed": 0, "add_finding": 0}
CODE_KEYWORDS = ("code", "error_code", "finding_code")


def kinds_of_errors(root: type[GPUMeshError] = GPUMeshError) -> Iterator[type[GPUMeshError]]:
    yield root
    for kind in root.__subclasses__():
        yield from kinds_of_errors(kind)


@cache
def written_codes() -> dict[str, str]:
    """Each code in the source and a place there: classes' ``code``, findings, failures, ``finding_code=…``."""
    return {
        code: f"{path.relative_to(PACKAGE)}:{expression.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for expression in code_expressions(ast.parse(path.read_text()))
        for code in constants(expression)
    }


def code_expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """The expressions in a module whose values are codes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in CODE_KEYWORDS for target in targets):
                yield node.value
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        place = CODE_PLACES.get(name)
        if place is not None and len(node.args) > place:
            yield node.args[place]
        yield from (keyword.value for keyword in node.keywords if keyword.arg in CODE_KEYWORDS)


def constants(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from constants(node.body)
        yield from constants(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from constants(value)


def test_every_code_in_the_source_is_explained() -> None:
    codes = written_codes()
    assert len(codes) > 60, "the search finds them"
    missing = {code: where for code, where in codes.items() if CODE.fullmatch(code) and code not in CATALOG}
    assert not missing


def test_every_error_is_explained() -> None:
    missing = {kind.code for kind in kinds_of_errors() if kind.code not in CATALOG}
    assert not missing


def test_every_tunnel_error_comes_back_from_its_code() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.TunnelError):
            assert type(errors.tunnel_error_from_code(kind.code, "x")) is kind


def test_every_explanation_is_of_a_code_that_exists() -> None:
    used = set(written_codes()) | {kind.code for kind in kinds_of_errors()}
    assert set(CATALOG) <= used


@pytest.mark.parametrize("code", CATALOG)
def test_an_explanation_says_what_why_and_what_to_do(code: str) -> None:
    entry = CATALOG[code]
    assert entry.code == code
    assert CODE.fullmatch(code)
    assert entry.title
    assert entry.title[0].islower() or entry.title.split()[0] in ("NVIDIA", "Ollama", "nvidia-smi")
    assert not entry.title.endswith(".")
    for text in (entry.meaning, entry.remedy):
        assert text.endswith((".", "`", "`.", ")."))
        assert len(text) >= 15
        assert text.count("`") % 2 == 0
    assert entry.meaning != entry.remedy


def test_causes_are_codes() -> None:
    for code, causes in CAUSES.items():
        assert {code, *causes} <= set(CATALOG)
        assert code not in causes


@pytest.mark.parametrize("spelling", ["same-gpu", "SAME-GPU", " same_gpu ", "same gpu"])
def test_case_blanks_and_underscores_of_a_code_do_not_matter(spelling: str) -> None:
    explanation = explain(spelling)
    assert explanation is not None
    assert explanation.code == "same-gpu"


def test_the_families_are_read_at_the_first_look_up() -> None:
    program = (
        "import sys; from gpumesh.audit import CATALOG; name = 'gpumesh.audit.catalog.errors'; "
        "assert name not in sys.modules; len(CATALOG); assert name in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_code_is_in_two_families() -> None:
    from gpumesh.audit.catalog import configuration, gateways, gpus, hosts, servers
    from gpumesh.audit.catalog import errors as command_errors

    families = (hosts, gpus, servers, gateways, configuration, command_errors)
    assert sum(len(family.EXPLANATIONS) for family in families) == len(CATALOG)


def test_a_code_that_does_not_exist_has_no_explanation() -> None:
    assert explain("nonsense") is None
