"""`gpumesh service`: makes the mesh a service that the system starts and keeps up: systemd, or launchd on macOS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpumesh.cli.command_group import new_app
from gpumesh.cli.global_options import GlobalOptions, global_options
from gpumesh.cli.json_output import json_option, print_json
from gpumesh.errors import GPUMeshError, UsageError

if TYPE_CHECKING:
    from gpumesh.daemon.service.definition import ServiceDefinition
    from gpumesh.daemon.service.managers import ServiceManager

DEFAULT_NAME = "gpumesh"
SYSTEM_VARIABLES_FILE = Path("/etc/gpumesh/secrets.env")

SystemOption = Annotated[
    bool, typer.Option("--system", help="A service of the whole system, which runs as you; needs sudo.")
]
NameOption = Annotated[
    str, typer.Option("--name", metavar="NAME", help="The service's name, where there are several mesh.yaml.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Also if its file was changed or is not ours.")]

app = new_app(no_args_is_help=True)


@app.callback()
def service() -> None:
    """Make the mesh a service: started by the system, and again after a crash."""


@app.command()
def install(
    ctx: typer.Context,
    system: SystemOption = False,
    name: NameOption = DEFAULT_NAME,
    print_only: Annotated[bool, typer.Option("--print", help="Print the unit or agent, and change nothing.")] = False,
    save_variables: Annotated[
        bool,
        typer.Option(
            "--save-variables", help="Copy the variables that mesh.yaml names from here into the service's file (0600)."
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Write the unit (on macOS the agent), and start the mesh with it: now, at boot or login, and after a crash.

    A service has none of your shell's variables. Those that mesh.yaml names for passwords and keys go into a file of
    mode 0600, which --save-variables writes; they never stand in the unit. It has no SSH agent either: a key file
    without a passphrase, for this purpose only, is the usual way. `gpumesh reload`, SIGHUP and
    `systemctl --user reload gpumesh` make it read mesh.yaml again.

    \b
    Examples:
      gpumesh service install
      gpumesh service install --save-variables
      sudo gpumesh service install --system -c /home/ada/mesh.yaml
      gpumesh service install --print > gpumesh.service
    """
    from gpumesh.cli.views.service_status import installed_lines
    from gpumesh.daemon.service.definition import FileOrigin

    options = global_options(ctx)
    manager, definition = _find_manager(system), _make_definition(options, name, system=system)
    text = manager.render(definition)
    if print_only:
        typer.echo(text, nl=False)
        return
    manager.require_available()
    path, old_text = manager.path(name), _read(manager.path(name))
    origin = manager.origin(old_text)
    if not force:
        _refuse_other_file(path, origin, hint="--force overwrites it, --print shows what would be written")
        if old_text is not None and str(definition.config) not in old_text:
            raise UsageError(
                f"the service {name} runs another mesh.yaml ({path})",
                hint="--name gives this one a service of its own, --force replaces the other",
            )
    needed_variables = _needed_variables(options)
    service_pid = None if origin is FileOrigin.MISSING else manager.state(name).pid
    _refuse_mesh_outside_service(options, service_pid)
    if save_variables:
        _save_variables(definition.variables_file, needed_variables)
    if text != old_text:
        _write(path, text)
    manager.start(name, is_new=text != old_text)
    typer.echo("\n".join(installed_lines(manager, definition, needed_variables)))


@app.command()
def uninstall(
    ctx: typer.Context, system: SystemOption = False, name: NameOption = DEFAULT_NAME, force: ForceOption = False
) -> None:
    """Stop the service, let what is in flight end, and remove its unit. mesh.yaml and the variables stay."""
    from gpumesh.daemon.service.definition import FileOrigin

    manager = _find_manager(system)
    manager.require_available()
    path = manager.path(name)
    origin = manager.origin(_read(path))
    if origin is FileOrigin.MISSING:
        raise UsageError(f"there is no service {name} to uninstall: {path} does not exist")
    if not force:
        _refuse_other_file(path, origin, hint="--force removes it")
    manager.stop(name)
    path.unlink(missing_ok=True)
    manager.forget(name)
    if not global_options(ctx).quiet:
        kept = _variables_file(system)
        also = f"; its variables stay in {kept}" if kept.exists() else ""
        typer.echo(f"stopped the service {name} and removed {path}{also}")


@app.command()
def status(
    ctx: typer.Context,
    system: SystemOption = False,
    name: NameOption = DEFAULT_NAME,
    as_json: Annotated[bool, json_option()] = False,
) -> None:
    """Say whether the mesh is a service, whether it runs, and what it needs. `gpumesh status` shows the mesh itself."""
    from gpumesh.cli.views.service_status import describe_service, status_lines

    manager = _find_manager(system)
    manager.require_available()
    definition = _make_definition(global_options(ctx), name, system=system)
    document = describe_service(
        manager, definition, _needed_variables(global_options(ctx)), text=_read(manager.path(name))
    )
    if as_json:
        print_json(document)
    else:
        typer.echo("\n".join(status_lines(document)))


def _find_manager(system: bool) -> ServiceManager:
    """The manager of services of this machine. Raises UsageError where there is none that we know."""
    if sys.platform == "darwin":
        from gpumesh.daemon.service.launchd import Launchd

        if system:
            raise UsageError("--system is for systemd: on macOS a service is an agent of your user")
        return Launchd()
    if sys.platform == "win32":
        raise UsageError("there are no services for Windows itself: in WSL2, gpumesh has those of Linux")
    from gpumesh.daemon.service.systemd import Systemd

    return Systemd(system=system)


def _make_definition(options: GlobalOptions, name: str, *, system: bool) -> ServiceDefinition:
    """The definition of the service: what it runs, and as which user. Raises UsageError for a name that cannot be a
    service's, or without a mesh.yaml."""
    from gpumesh.config import environment
    from gpumesh.daemon.service.definition import ServiceDefinition, is_valid_name

    if not is_valid_name(name):
        raise UsageError(f"{name!r} cannot be a service's name: letters, digits, dots and dashes can")
    user = (environment.get("SUDO_USER") or environment.user()) if system else None
    return ServiceDefinition(name, _program(), options.config_file(), _variables_file(system), user)


def _program() -> tuple[str, ...]:
    """The command that runs this gpumesh, wherever it is installed."""
    script = Path(sys.executable).with_name("gpumesh")
    return (str(script),) if script.exists() else (sys.executable, "-P", "-m", "gpumesh")


def _variables_file(system: bool) -> Path:
    from gpumesh.config import environment

    return SYSTEM_VARIABLES_FILE if system else environment.config_dir() / "secrets.env"


def _needed_variables(options: GlobalOptions) -> tuple[str, ...]:
    """The variables that mesh.yaml names and that a service does not have by itself. Raises ConfigError."""
    from gpumesh.config.mesh_file.variable_expansion import find_required_variables

    names = options.topology().secret_variables | find_required_variables(options.config_file().read_text("utf-8"))
    return tuple(sorted(names - {"HOME", "USER", "LOGNAME"}))


def _read(path: Path) -> str | None:
    """The text of a unit; ``None`` if there is no such file. A link, as of a unit that is masked, counts as a text that
    is not ours."""
    try:
        return "" if path.is_symlink() else path.read_text("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None


def _refuse_other_file(path: Path, origin: object, *, hint: str) -> None:
    """Raises UsageError for a file that `gpumesh service install` has not written, or that was changed since."""
    from gpumesh.daemon.service.definition import FileOrigin

    if origin is FileOrigin.FOREIGN:
        raise UsageError(f"{path} was not written by `gpumesh service install`", hint=hint)
    if origin is FileOrigin.CHANGED:
        raise UsageError(f"{path} was changed since `gpumesh service install` wrote it", hint=hint)


def _refuse_mesh_outside_service(options: GlobalOptions, service_pid: int | None) -> None:
    """Raises GPUMeshError if a mesh of this file runs in another process than the service: the service could not start
    then. ``service_pid``: the service's process; ``None`` if it does not run."""
    from gpumesh.daemon.mesh_lock import LockWatch

    watch = LockWatch.open(options.paths())
    if watch is None:
        return
    with watch:
        if watch.held and watch.pid != service_pid:
            raise GPUMeshError(
                f"the mesh of {options.config_file()} runs already, not as a service (pid {watch.pid})",
                hint="`gpumesh down`, and then the same again",
            )


def _save_variables(path: Path, names: tuple[str, ...]) -> None:
    """Copies the variables that are set here into the service's file. Raises UsageError, and GPUMeshError if the file
    cannot be written."""
    from gpumesh.config.credentials import is_secret_set, read_secret
    from gpumesh.daemon.service.variables_file import add_variables

    try:
        add_variables(path, {name: read_secret(name) for name in names if is_secret_set(name)})
    except OSError as error:
        raise GPUMeshError(f"cannot write {path}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    """Writes the unit as a whole. Raises GPUMeshError."""
    from gpumesh.files import atomic_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_file.replace(path, text, mode=0o644, errors="surrogateescape")
    except OSError as error:
        raise GPUMeshError(f"cannot write {path}: {error.strerror}") from error
