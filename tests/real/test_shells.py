"""TAB and Enter in real shells, with a host in the mesh that names its models as an attacker would."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from gpumesh.lab.profile import QWEN_7B
from tests.cli.meshes import SimulatedMesh, background_mesh, quick_host
from tests.prerequisites import needs
from tests.real.command import GPUMESH
from tests.real.shells import SHELLS, shell
from tests.real.warm_commands import warm_commands

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

HONEST = ("qwen2.5:7b", "qwen2.5:14b", "hf.co/me/Llama-3.2-1B-GGUF:Q4_K_M", "user@corp/x+y")
# Each begins with letters of its own, so that TAB has one to complete.
HOSTILE = (
    "za\\$(touch ran)",
    "zb$(touch ran)",
    "zc`touch ran`",
    "zd;touch ran",
    'ze"$(touch ran)"',
    "zf'$(touch ran)'",
    "zg)) $(touch ran) ((",
    "zh:$(touch ran):x",
    "zi\n$(touch ran)",
    "zj(e:'touch ran':)",
    "zk<(touch ran)",
    "zl&touch ran&",
)
# What a shell expands without a command in it; and an option.
EXPANDED = ("zm x", "zn'x", "zo${HOME}", "zp*", "zq\\x", "zr\u00e9x", "~root", "=ls", "-rf", "--help", "")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SimulatedMesh]:
    """A mesh in the background for all tests of this module, which only ask it for names."""
    models = tuple(replace(QWEN_7B, name=name) for name in (*HONEST, *HOSTILE, *EXPANDED))
    hosts = (quick_host("alpha", ssh=False, models=models), quick_host("beta", ssh=False))
    async with background_mesh(tmp_path_factory.mktemp("mesh"), *hosts) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(running_mesh: SimulatedMesh, tmp_path: Path) -> SimulatedMesh:
    """The running mesh, used from a new home folder, when it knows the models of both hosts."""
    await running_mesh.wait_all_up()
    home = tmp_path / "home"
    home.mkdir()
    return replace(running_mesh, gpumesh=replace(running_mesh.gpumesh, home=home))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in SHELLS])
async def test_what_a_host_calls_its_models_never_runs(mesh: SimulatedMesh, kind: str) -> None:
    async with shell(mesh.gpumesh, kind, warm=True) as shown:
        for name in HOSTILE:
            typed = name[:2]
            assert await shown.complete(f"run -m {typed}") == ["run", "-m", typed], name
            assert not (mesh.gpumesh.home / "ran").exists(), f"{name!r} was run by {kind}"
        # All of them at once, as a list to choose from.
        assert await shown.complete("models load z") == ["models", "load", "z"]
        assert not (mesh.gpumesh.home / "ran").exists()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in SHELLS])
async def test_honest_names_complete(mesh: SimulatedMesh, kind: str) -> None:
    (mesh.gpumesh.home / "other mesh.yaml").touch()
    async with shell(mesh.gpumesh, kind, warm=True) as shown:
        if kind == "bash":
            assert await shown.complete("run -m qwen2.5:7") == ["run", "-m", "qwen2.5:7b"]
            await shown.run("COMP_WORDBREAKS=${COMP_WORDBREAKS//:}")  # as npm's completion does
        assert await shown.complete("run -m qwen2.5:7") == ["run", "-m", "qwen2.5:7b"]
        assert await shown.complete("run -m qwen2.5:1") == ["run", "-m", "qwen2.5:14b"]
        assert await shown.complete("run -m h") == ["run", "-m", "hf.co/me/Llama-3.2-1B-GGUF:Q4_K_M"]
        assert await shown.complete("models rm qwen2.5:7b u") == ["models", "rm", "qwen2.5:7b", "user@corp/x+y"]
        assert await shown.complete("models rm user@c") == ["models", "rm", "user@corp/x+y"]
        assert await shown.complete("drain al") == ["drain", "alpha"]
        assert await shown.complete("stat") == ["status"]
        assert await shown.complete("status --wat") == ["status", "--watch"]
        # Names of files are the shell's own to complete, and to quote.
        assert await shown.complete("-c oth") == ["-c", "other mesh.yaml"]


@needs("zsh")
async def test_a_script_that_was_installed_long_ago_runs_nothing(mesh: SimulatedMesh) -> None:
    """Typer's own evaluates what the program prints."""
    from typer import _completion_shared as shared

    values = {"prog_name": "gpumesh", "complete_func": "_gpumesh_completion", "autocomplete_var": "_GPUMESH_COMPLETE"}
    async with shell(mesh.gpumesh, "zsh") as shown:
        (mesh.gpumesh.home / "old.zsh").write_text(shared.COMPLETION_SCRIPT_ZSH % values)
        await shown.run("source ~/old.zsh")
        for name in HOSTILE[:3]:
            assert await shown.complete(f"run -m {name[:2]}") == ["run", "-m", name[:2]], name
            assert not (mesh.gpumesh.home / "ran").exists(), f"{name!r} was run"
        assert await shown.complete("run -m hf") == ["run", "-m", "hf.co/me/Llama-3.2-1B-GGUF:Q4_K_M"]
        # And ours, as a person takes it from --show-completion.
        show = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 gpumesh --show-completion zsh"
        await shown.run(f'eval "$({show})"')
        assert await shown.complete("run -m qwen2.5:7") == ["run", "-m", "qwen2.5:7b"]
        assert await shown.complete("run -m za") == ["run", "-m", "za"]
        assert not (mesh.gpumesh.home / "ran").exists()


@pytest.mark.parametrize("protocol", ["bash", "zsh", "fish", "powershell"])
async def test_nothing_else_leaves_for_a_shell(mesh: SimulatedMesh, protocol: str) -> None:
    """What a completion that was installed long ago gets to see, in each shell's form."""
    gpumesh = mesh.gpumesh
    for line in ("gpumesh run -m ", "gpumesh models load ", "gpumesh run -m -", "gpumesh models load -- -"):
        environment = gpumesh.environment(
            _GPUMESH_COMPLETE=f"complete_{protocol}",
            COMP_WORDS=line,
            COMP_CWORD=str(len(line.split(" ")) - 1),
            _TYPER_COMPLETE_ARGS=line,
            _TYPER_COMPLETE_FISH_ACTION="get-args",
        )
        code, out, _ = await warm_commands().run((str(GPUMESH),), env=environment, cwd=gpumesh.home, stdin=None)
        said = out.decode()
        assert code == 0
        assert "touch" not in said, said
        for name in EXPANDED:
            assert not name or name == "--help" or name not in said, said
        if line.endswith(" "):
            assert all(name.replace(":", "") in said.replace("\\", "").replace(":", "") for name in HONEST), said
