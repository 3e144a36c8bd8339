"""What the documentation says is so: its commands parse, its mesh.yaml are valid, its links lead somewhere, its
generated pages are those of this code, and its tables leave nothing out."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

from gpumesh import config, state
from gpumesh.bench.simulate import fleet_file
from gpumesh.cli.global_options import GlobalOptions
from gpumesh.cli.root_command import app
from gpumesh.config.mesh_file.file_schema import MeshFile, Node
from gpumesh.gateway.model_requests import MODEL_ROUTES
from gpumesh.wire import status_from_json

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^ *```(?P<kind>\w*)(?P<more>[^\n]*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)
OPERATORS = frozenset({"|", "||", "&&", ";", "&", "<", ">", ">>", "(", ")"})


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    kind: str
    more: str
    body: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match["kind"], match["more"].strip(), match["body"], line)


def prose(page: Path) -> str:
    """Without its code blocks."""
    return FENCE.sub("", page.read_text())


# -- generated pages -------------------------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_those_of_this_code() -> None:
    for path, text in generator().pages().items():
        assert path.read_text() == text, f"{path.name} is out of date: run `python docs/generate.py`"


# -- commands --------------------------------------------------------------------------------------------------------


@cache
def root() -> Any:
    return get_command(app)


def commands_in(line: str) -> Iterator[list[str]]:
    """The words of each `gpumesh …` in a line of shell, whatever stands around it."""
    for inner in re.findall(r"\$\(([^)]*)\)", line):
        yield from commands_in(inner)
    line = re.sub(r"\$\([^)]*\)", "X", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in OPERATORS:
            words.append(word)
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["gpumesh"]:
            yield words[1:]
        words = ["a-file"] if word in ("<", ">", ">>") else []


def check_command(words: list[str], *, only_named: bool = False) -> None:
    """Raises what the command line would say. Nothing is run. ``only_named``: arguments may be missing."""
    if "--install-completion" in words or "--show-completion" in words:
        return  # they act while they are parsed
    command, path, context, rest = root(), "gpumesh", None, list(words)
    try:
        while rest or not hasattr(command, "commands"):  # a group alone shows its help
            context = command.make_context(path, rest, parent=context, obj=GlobalOptions())
            if not hasattr(command, "commands"):
                return
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            if rest:
                path, command, rest = command.resolve_command(context, rest)
    except Exception as error:
        # --help and --version have done all there was to do.
        if type(error).__name__ != "Exit" and not (only_named and type(error).__name__ == "MissingParameter"):
            raise AssertionError(f"gpumesh {shlex.join(words)}: {error!r}") from error


def shell_lines(block: Block) -> Iterator[str]:
    for line in block.body.replace("\\\n", " ").splitlines():
        shown = re.sub(r"^\$ ", "", line.strip())
        # In a block of text only what is typed counts, not what is printed.
        if block.kind == "text" and not line.startswith("$ "):
            continue
        if shown and not shown.startswith("#"):
            yield shown


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_that_is_shown_parses(page: Path) -> None:
    lines = [(line, False) for block in blocks(page) if block.kind in ("sh", "text") for line in shell_lines(block)]
    lines += [(span, True) for span in re.findall(r"`([^`\n]+)`", prose(page)) if span.startswith("gpumesh ")]
    for line, only_named in lines:
        for words in commands_in(re.sub(r"\s#\s.*$", "", line).replace("…", "X")):
            if words[0] != "COMMAND":  # any of them
                check_command(words, only_named=only_named)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for line in ("gpumesh up --quick", "X=1 gpumesh nothing", 'eval "$(gpumesh env --shell csh)"', "a | gpumesh trust"):
        found = list(commands_in(line))
        assert len(found) == 1
        with pytest.raises(AssertionError):
            check_command(found[0])


def test_the_examples_of_the_help_parse() -> None:
    """They are in docs/commands.md too, which is generated; so this says that the help is right."""
    shown = [block for block in blocks(DOCS / "commands.md") if block.kind == "sh"]
    assert len(shown) >= 7
    assert sum(1 for block in shown for line in shell_lines(block) for _ in commands_in(line)) >= 15


def test_nobody_is_told_to_install_somebody_elses_project() -> None:
    for page in PAGES:
        assert not re.search(r"pip3? install (-U |--upgrade )?gpumesh(?!-cli)", page.read_text()), page_id(page)


def test_the_python_that_is_shown_compiles() -> None:
    shown = [(page, block) for page in PAGES for block in blocks(page) if block.kind == "python"]
    assert shown
    for page, block in shown:
        compile(block.body, f"{page_id(page)}:{block.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


# -- mesh.yaml -------------------------------------------------------------------------------------------------------


MESHES = [
    pytest.param(page, block, id=f"{page_id(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.kind == "yaml" and not block.more
]


@pytest.mark.parametrize(("page", "block"), MESHES)
def test_every_mesh_yaml_that_is_shown_is_valid(page: Path, block: Block) -> None:
    """A part of one is made whole by a node. A block of another kind of YAML says whose it is: ```yaml title="…"."""
    document = yaml.safe_load(block.body)
    assert set(document) <= set(MeshFile.settings), "not mesh.yaml: give it a title"
    text = (
        block.body if "nodes" in document else block.body + "\nnodes: [{name: a, backend: {url: http://127.0.0.1:1}}]\n"
    )
    mesh = config.parse(text, file=page_id(page), env={"LOGNAME": "ada"}, home=Path("/home/ada"), source=page)
    assert mesh.nodes


def test_the_fleet_file_that_is_shown_is_valid_and_its_keys_are_described() -> None:
    page = DOCS / "how-to" / "bench.md"
    (shown,) = [block for block in blocks(page) if block.more == 'title="fleet.yaml"']
    assert fleet_file.parse_fleet(shown.body, file="fleet.yaml")
    first_cells = re.findall(r"^\| (`.*?) \|", page.read_text(), re.MULTILINE)
    described = {key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)}
    assert set(fleet_file.NODE_KEYS) <= described


def test_the_readme_shows_a_mesh_yaml_of_three_lines() -> None:
    shown = [block for block in blocks(ROOT / "README.md") if block.kind == "yaml"]
    assert len(shown[0].body.splitlines()) <= 4
    assert "nodes" in yaml.safe_load(shown[0].body)


def test_the_defaults_that_are_written_are_those_in_effect() -> None:
    """Of the keys that a mesh.yaml of one line leaves out."""
    text = (DOCS / "configuration.md").read_text()
    smallest = "nodes: [{name: a, ssh: {host: h}, address_from: {command: x}}]"
    mesh = config.parse(smallest, file="mesh.yaml", env={"LOGNAME": "ada"}, home=Path("/home/ada"))
    effect = yaml.safe_load(config.dump_effective(mesh))
    (node,) = effect["nodes"]
    compared = 0
    for title, values in (
        ("Top level", effect),
        ("gateway", effect["gateway"]),
        ("nodes", node),
        ("ssh", node["ssh"]),
        ("address_from", node["address_from"]),
        ("backend", node["backend"]),
    ):
        section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for key, said in re.findall(r"^\| `(\w+)` \| [^|]* \| `([^`]+)`[^|]* \|", section, re.MULTILINE):
            if key in values:
                value = str(values[key]).lower() if isinstance(values[key], bool) else str(values[key])
                assert value.removesuffix(".0").replace("/home/ada/", "~/") == said, f"{title}.{key}"
                compared += 1
    assert compared >= 15


# -- links and paths -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page_id(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`((?:gpumesh|tests|benchmarks|examples|docs|\.ci)/[\w./-]*)`", page.read_text())
    named += re.findall(r"\b((?:benchmarks|examples|docs)/[\w-]+\.(?:py|sh|yaml|md|json))\b", page.read_text())
    for path in named:
        assert (ROOT / path).exists(), f"{page_id(page)} names {path}"


def test_where_to_add_names_what_the_source_has() -> None:
    """Each name in the table is one of the package: a class, a constant or a function."""
    table = (ROOT / "docs/architecture.md").read_text().split("## Where to add")[1].split("\n## ")[0]
    names = re.findall(r"`([A-Za-z_]+)`", table)
    defined = {
        name
        for file in (ROOT / "gpumesh").rglob("*.py")
        for name in re.findall(r"^(?:class |def |async def )?([A-Za-z_]+)", file.read_text(), re.MULTILINE)
    }
    assert len(names) >= 8
    assert set(names) <= defined | {"connect"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        source = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        assert f"def {name}(" in source, f"{page_id(page)} names {file}::{name}"


def test_every_page_is_in_the_navigation() -> None:
    """And nothing else is: `mkdocs build --strict` would say so, but is not among the tests' requirements."""

    def files(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        for inner in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            yield from files(inner)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(files(site["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


# -- tables that leave nothing out -----------------------------------------------------------------------------------


def test_every_field_of_the_status_is_described() -> None:
    text = (DOCS / "status-json.md").read_text()
    pending: list[type] = [state.MeshState]
    seen: set[type] = set()
    while pending:
        kind = pending.pop()
        if kind in seen or not dataclasses.is_dataclass(kind):
            continue
        seen.add(kind)
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in text, f"{kind.__name__}.{field.name}"
            pending += [one for name, one in vars(state).items() if isinstance(one, type) and name in str(field.type)]
    assert len(seen) >= 10


def test_the_status_that_is_shown_is_one() -> None:
    (shown,) = [block for block in blocks(DOCS / "status-json.md") if block.kind == "json"]
    document = json.loads(shown.body)
    assert status_from_json(document).nodes
    known = {field.name for field in dataclasses.fields(state.NodeState)}
    assert all(set(node) <= known for node in document["nodes"])


def test_every_route_and_header_of_the_gateway_is_described() -> None:
    text = (DOCS / "gateway.md").read_text()
    source = "\n".join(path.read_text() for path in (ROOT / "gpumesh" / "gateway").glob("*.py"))
    for route in MODEL_ROUTES:
        assert f"`{route}`" in text, route
    for route in re.findall(r'"(/(?:api|v1|mesh|healthz|metrics|ui)[\w/]*)"', source):
        assert route.rstrip("/") in text, route
    for header in set(re.findall(r"X-GPUMesh-[A-Za-z-]+", source)):
        assert f"`{header}`" in text, header


def test_a_node_has_every_key_that_the_reference_has() -> None:
    """And the reference none that a node has not: a key that was renamed would stay behind in it."""
    text = (DOCS / "configuration.md").read_text()
    section = text.partition("## nodes\n")[2].partition("\n## ")[0]
    keys = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert keys == set(Node.settings)
