"""What `gpumesh service` needs of a service manager, and the running of the manager's own program."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpumesh.config import environment
from gpumesh.daemon.service.definition import FileOrigin, ServiceDefinition
from gpumesh.errors import GPUMeshError
from gpumesh.text.quoting import shell_words

COMMAND_TIMEOUT_S = 120.0  # more than a service may take to start


@dataclass(frozen=True, slots=True)
class ServiceState:
    """``state`` is in the manager's own words. ``pid``, ``since``, ``restarts``: ``None`` if the manager does not tell.
    ``starts_by_itself``: the manager starts the service at boot or login."""

    state: str
    is_active: bool
    starts_by_itself: bool
    pid: int | None = None
    since: str | None = None
    restarts: int | None = None


class ServiceManager(Protocol):
    """A manager of services: the user's or the system's systemd, or launchd. Its methods raise GPUMeshError when the
    manager cannot do what they ask for."""

    def require_available(self) -> None:
        """Raises GPUMeshError, with what a person can do, if this manager cannot be reached here."""

    def path(self, name: str) -> Path:
        """The file that defines the service."""

    def render(self, definition: ServiceDefinition) -> str:
        """The text of that file."""

    def origin(self, text: str | None) -> FileOrigin:
        """Who has written this text of such a file."""

    def start(self, name: str, *, is_new: bool) -> None:
        """Starts the service now, and from now on by itself. With ``is_new`` its file was just written, so that a
        service that runs starts anew."""

    def stop(self, name: str) -> None:
        """Stops the service, and does not start it by itself any more."""

    def forget(self, name: str) -> None:
        """Must be called after the file was removed."""

    def state(self, name: str) -> ServiceState: ...

    def log_command(self, name: str) -> str:
        """The command that shows what the service printed."""

    def restart_command(self, name: str) -> str: ...

    def boot_remark(self) -> str | None:
        """What a person must know of when the service runs, and can change; ``None`` if it always runs."""


def run_program(arguments: Sequence[str], *, changes: Mapping[str, str | None] | None = None) -> str:
    """Runs a manager's program and returns its stdout. Raises GPUMeshError with the program's own words."""
    done = try_program(arguments, changes=changes)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = f": {lines[0]}" if lines else ""
        raise GPUMeshError(f"`{shell_words(arguments)}` failed with {done.returncode}{reason}")
    return done.stdout


def try_program(
    arguments: Sequence[str], *, changes: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """As ``run_program``, but a failure of the program is returned. Raises GPUMeshError if it cannot be run."""
    try:
        return subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            env=environment.child_environment({"LC_ALL": "C", **(changes or {})}),
        )
    except subprocess.TimeoutExpired as error:
        raise GPUMeshError(f"`{shell_words(arguments)}` did not end within {COMMAND_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise GPUMeshError(f"cannot run {arguments[0]}: {error.strerror}") from error
