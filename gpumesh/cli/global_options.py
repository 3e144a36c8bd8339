"""The options of `gpumesh` itself (`--config`, `--quiet`, `--verbose`), and the configuration that they select."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpumesh.errors import UsageError, unknown_node
from gpumesh.text.quoting import paste_command
from gpumesh.text.sentences import join_all

if TYPE_CHECKING:
    from gpumesh.daemon.paths import MeshPaths
    from gpumesh.topology import NodeSpec, Topology

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="mesh.yaml (else $GPUMESH_CONFIG, ./mesh.yaml, …)."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Results only: no progress, no remarks.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]


@dataclass(slots=True)
class GlobalOptions:
    """The options of this run. The root command stores them in ``ctx.obj``."""

    config: Path | None = None
    quiet: bool = False
    verbose: bool = False

    def config_file(self) -> Path:
        """The mesh.yaml in use. Raises UsageError when there is none."""
        from gpumesh import config

        return config.find_config(self.config)

    def paths(self) -> MeshPaths:
        """The paths of the mesh that belongs to the mesh.yaml in use. If the file was removed, but a mesh that was
        started from it still runs, returns the paths of that mesh, so that `down` can stop it. Raises UsageError when
        there is neither."""
        from gpumesh import config
        from gpumesh.daemon.paths import for_config

        try:
            return for_config(self.config_file())
        except UsageError:
            for removed_file in config.search_paths(self.config):
                paths = for_config(removed_file)
                if paths.lock.exists():  # its mesh runs
                    return paths
            raise

    def topology(self) -> Topology:
        """The content of the mesh.yaml in use. Raises ConfigError with every problem of the file."""
        from gpumesh import config

        return config.load(self.config_file())


def global_options(ctx: typer.Context) -> GlobalOptions:
    """The options of this run, which the root command has stored."""
    options = ctx.find_root().obj
    assert isinstance(options, GlobalOptions), "the root command's callback has not run"
    return options


def find_node(topology: Topology, name: str) -> NodeSpec:
    """The node of the configuration with this name. Raises UsageError, which names the nodes, if there is none, also
    for a pool, which may run: it is a node of the mesh only then, and never of the configuration."""
    try:
        return topology.node(name)
    except KeyError:
        members = {pool.name: [member.node for member in pool.members] for pool in topology.pools}
        if name in members:
            raise UsageError(
                f"{name} is a pool, not a node of mesh.yaml: its nodes are {join_all(members[name])}",
                hint=paste_command("gpumesh pool status {POOL}", POOL=name) + " shows whether it runs",
            ) from None
        raise unknown_node(name, (node.name for node in topology.nodes)) from None


def repeat_global_options() -> list[Any]:
    """New options ``--config``, ``--quiet`` and ``--verbose`` for a single command, which set the same GlobalOptions as
    the options before the command's name."""
    from typer.main import get_command as build_command

    template = typer.Typer(rich_markup_mode=None, add_completion=False)

    @template.command()
    def _(config: ConfigOption = None, quiet: QuietOption = False, verbose: VerboseOption = False) -> None: ...

    options: list[Any] = []
    for option in build_command(template).params:
        if option.name in ("config", "quiet", "verbose"):  # not Typer's own --help
            option.callback = _store_option
            option.expose_value = False  # the command's function has no parameter for it
            options.append(option)
    return options


def _store_option(ctx: Any, parameter: Any, value: Any) -> Any:
    """The callback of the repeated options: stores the option's value in the GlobalOptions, if the option is given.
    Returns the value unchanged."""
    if value:  # otherwise the option is not given: it must not replace a value from before the command
        # Completion does not run the root's callback, so there is no GlobalOptions: it reads ``meta`` instead.
        ctx.meta[f"gpumesh.{parameter.name}"] = value
        options = ctx.find_root().obj
        if options is not None:
            setattr(options, parameter.name, value)
    return value
