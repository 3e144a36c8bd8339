"""What the options of `gpumesh` itself say, and how a command gets at its configuration and its mesh."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.daemon.session import Session
    from gpumesh.topology import Topology

T = TypeVar("T")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="mesh.yaml (else $GPUMESH_CONFIG, ./mesh.yaml, …)."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Results only: no progress, no remarks.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]


@dataclass(slots=True)
class GlobalOptions:
    """Typer makes one for each run (``ctx.obj``)."""

    config: Path | None = None
    quiet: bool = False
    verbose: bool = False

    def config_file(self) -> Path:
        """The mesh.yaml in use. Raises ConfigError when there is none."""
        from gpumesh import config

        return config.find_config(self.config)

    def paths(self) -> MeshPaths:
        """Those of the mesh.yaml in use, and of one that is gone while its mesh runs: that can still be stopped."""
        from gpumesh import config
        from gpumesh.daemon import paths

        try:
            return paths.for_config(self.config_file())
        except UsageError:
            for place in config.search_paths(self.config):
                left = paths.for_config(place)
                if left.lock.exists():
                    return left
            raise

    def topology(self) -> Topology:
        """Raises ConfigError with every problem of the file."""
        from gpumesh import config

        return config.load(self.config_file())


def global_options(ctx: typer.Context) -> GlobalOptions:
    """Those of this run."""
    found = ctx.find_root().obj
    assert isinstance(found, GlobalOptions), "the root callback makes it"
    return found


def repeat_global_options() -> list[Any]:
    """``--config``, ``--quiet`` and ``--verbose`` as options of a single command, which set the same Settings."""
    from typer.main import get_command as build_command

    late = typer.Typer(rich_markup_mode=None, add_completion=False)

    @late.command()
    def _(config: ConfigOption = None, quiet: QuietOption = False, verbose: VerboseOption = False) -> None: ...

    options: list[Any] = []
    for option in build_command(late).params:
        if option.name in ("config", "quiet", "verbose"):
            option.callback = _keep
            option.expose_value = False
            options.append(option)
    return options


def _keep(ctx: Any, parameter: Any, value: Any) -> Any:
    if value:
        ctx.meta[f"gpumesh.{parameter.name}"] = value  # for completion, which runs no callback of the root
        if ctx.find_root().obj is not None:
            setattr(ctx.find_root().obj, parameter.name, value)
    return value


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """An asynchronous command to its end. Ctrl-C cancels it, which ends what runs on the hosts, and exits with 130."""
    try:
        from gpumesh.daemon.process import event_loop

        return event_loop.run(main, use_uvloop=False)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        main.close()  # one that never began: Python would warn of it


@asynccontextmanager
async def open_session(chosen: GlobalOptions, *, embed: bool = True) -> AsyncGenerator[Session]:
    """The running mesh of this configuration, else one in this process for as long as the context is open.

    Raises MeshNotRunning when there is none and ``embed`` is off.
    """
    from gpumesh.daemon.lock import LockWatch
    from gpumesh.daemon.remote_session import RemoteSession
    from gpumesh.errors import MeshNotRunning

    paths = chosen.paths()
    watch = LockWatch.open(paths)
    if watch is not None:
        with watch:
            running = not watch.remove_if_stale(paths)
        if running and await _answers(paths.socket):
            yield RemoteSession(paths.socket)
            return
    if not embed:
        raise MeshNotRunning("no mesh is running for this configuration")
    from gpumesh.daemon import leftovers
    from gpumesh.daemon.local_session import LocalSession
    from gpumesh.mesh.mesh import Mesh

    leftovers.remove_leftovers()
    async with Mesh(chosen.topology()) as mesh:
        yield LocalSession(mesh)


async def _answers(socket: Path) -> bool:
    import asyncio

    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False  # it is only just starting, or ending: its socket is not there
    writer.close()
    await writer.wait_closed()
    return True
