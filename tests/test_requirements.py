"""What pyproject.toml asks for is what was tested, and everything that is imported is asked for.

That the lowest versions pass is `make lowest`'s to show. Here is what can be seen without installing anything.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from gpumesh.config.extras import DISTRIBUTION, PACKAGES

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = PROJECT["project"]["optional-dependencies"]
OPTIONAL = [Requirement(line) for extra in PACKAGES for line in EXTRAS[extra]]
DEV = [Requirement(line) for line in EXTRAS["dev"] if not line.startswith(DISTRIBUTION)]
ALL = [*RUNTIME, *OPTIONAL, *DEV, *map(Requirement, [*EXTRAS["docs"], *PROJECT["build-system"]["requires"]])]

# Whose private parts are used: where, and one of them. Their next version that may change such parts is not allowed
# until somebody has tried it.
PRIVATE = {
    "httpx": ("gpumesh/probes/http_client.py", "transport._pool"),
    "paramiko": ("gpumesh/tunnels/inprocess/channel_multiplexer.py", "transport._send_user_message("),
    "sshtunnel": ("gpumesh/tunnels/inprocess/sshtunnel_connector.py", "._make_ssh_forward_handler_class("),
    "typer": ("gpumesh/cli/deferred_parameters.py", "parameter._runtime_param"),
}
# Those whose distribution has another name than what is imported.
DISTRIBUTIONS = {"yaml": "pyyaml", "prometheus_client": "prometheus-client", "pytest_asyncio": "pytest-asyncio"}

FOLDERS = {path.name for path in ROOT.iterdir()}  # none of them is another's package


def by_name(requirements: list[Requirement]) -> list[object]:
    return [pytest.param(requirement, id=requirement.name) for requirement in requirements]


def bound(requirement: Requirement, operator: str) -> Version | None:
    return next((Version(each.version) for each in requirement.specifier if each.operator == operator), None)


@cache
def imports(folder: str) -> list[tuple[Path, str, str]]:
    """Each import from another's package: the file, the package, and the whole name of what is imported."""
    return list(find_imports(folder))


def find_imports(folder: str) -> Iterator[tuple[Path, str, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package = name.partition(".")[0]
                if package in sys.stdlib_module_names or package in FOLDERS:
                    continue
                if not path.with_name(f"{package}.py").exists():
                    yield path.relative_to(ROOT), package, name


@pytest.mark.parametrize("requirement", by_name(ALL))
def test_each_has_a_lower_bound(requirement: Requirement) -> None:
    assert bound(requirement, ">=") is not None


@pytest.mark.parametrize("requirement", by_name([*RUNTIME, *OPTIONAL]))
def test_what_users_install_has_an_upper_bound(requirement: Requirement) -> None:
    lowest, first_untried = bound(requirement, ">="), bound(requirement, "<")
    assert lowest is not None
    assert first_untried is not None
    assert lowest < first_untried


@pytest.mark.parametrize("name", PRIVATE)
def test_where_private_parts_are_used_the_next_version_that_may_change_them_is_not_allowed(name: str) -> None:
    """The next minor version of what is 0.x, the next major version of the rest."""
    file, part = PRIVATE[name]
    assert part in (ROOT / file).read_text(), "no longer used there: the row names another place, or goes"
    requirement = next(each for each in RUNTIME if each.name == name)
    first_untried, tried = bound(requirement, "<"), Version(metadata.version(name))
    assert first_untried is not None
    following = Version(f"{tried.major + 1}" if tried.major else f"0.{tried.minor + 1}")
    assert first_untried <= following or tried == bound(requirement, ">=")  # or it is the lowest that is installed


def test_no_other_private_module_is_imported() -> None:
    private = {
        (str(file), name) for file, package, name in imports("gpumesh") if package not in PRIVATE and "._" in name
    }
    assert private == set()


# The library hands out these libraries' own clients, if they are installed.
CLIENTS = {"ollama", "openai"}


def test_what_the_package_imports_is_asked_for() -> None:
    """Not only brought along by another, which may stop bringing it."""
    asked = {requirement.name.lower() for requirement in RUNTIME}
    missing = {
        (str(file), name)
        for file, package, name in imports("gpumesh")
        if package not in PACKAGES.values()
        if not (package in CLIENTS and file.parts[1] == "library")
        if DISTRIBUTIONS.get(package, package) not in asked
    }
    assert missing == set()


def test_what_an_extra_installs_is_imported_only_where_its_absence_is_explained() -> None:
    assert {extra: [requirement.name for requirement in map(Requirement, EXTRAS[extra])] for extra in PACKAGES} == {
        extra: [package] for extra, package in PACKAGES.items()
    }
    places = {(package, file.parts[1]) for file, package, _ in imports("gpumesh") if package in PACKAGES.values()}
    assert places == {("aiohttp", "lab"), ("redis", "batches"), ("redis", "coordination")}
    assert f"{DISTRIBUTION}[{','.join(PACKAGES)}]" in EXTRAS["dev"]
    assert PROJECT["project"]["name"] == DISTRIBUTION


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "docs"])
def test_what_the_tests_import_is_asked_for(folder: str) -> None:
    asked = {requirement.name.lower() for requirement in [*RUNTIME, *OPTIONAL, *DEV]}
    missing = {
        (str(file), name) for file, package, name in imports(folder) if DISTRIBUTIONS.get(package, package) not in asked
    }
    assert missing == set()


def test_ci_runs_the_lowest_versions() -> None:
    assert re.search(r"^PYTEST_ADDOPTS=.* make lowest ", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "--resolution lowest-direct" in (ROOT / "Makefile").read_text()
