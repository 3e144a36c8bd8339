"""systemd: the manager of our own user's services, or of the system's."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gpumesh.config import environment
from gpumesh.daemon.service.definition import FileOrigin, ServiceDefinition, find_origin
from gpumesh.daemon.service.managers import ServiceState, run_program, try_program
from gpumesh.daemon.service.systemd_unit import make_unit
from gpumesh.errors import GPUMeshError

SYSTEM_FOLDER = Path("/etc/systemd/system")
LINGER_FOLDER = Path("/var/lib/systemd/linger")  # has a file for each user whose services outlive the logins
BOOTED = Path("/run/systemd/system")  # exists where systemd has started the system (sd_booted(3))
PRINT_HINT = "`gpumesh service install --print` prints the unit"
_PROPERTIES = ("ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "ActiveEnterTimestamp", "Result")


class Systemd:
    """A ``ServiceManager``. ``system``: the system's systemd instead of our user's."""

    def __init__(self, *, system: bool) -> None:
        self._system = system

    def __repr__(self) -> str:
        return f"<Systemd {'system' if self._system else 'user'}>"

    def require_available(self) -> None:
        """Raises GPUMeshError if systemd does not run this system, or does not obey this user."""
        if shutil.which("systemctl") is None or not BOOTED.is_dir():
            raise GPUMeshError(
                "this system is not run by systemd, so it cannot keep a service up",
                hint=f"in WSL2, `systemd=true` under [boot] in /etc/wsl.conf turns it on; {PRINT_HINT}, and "
                "`gpumesh up -d` runs a mesh without a service",
            )
        if self._system:
            if os.geteuid() != 0:
                raise GPUMeshError("a service of the whole system needs root", hint="the same with sudo before it")
            return
        answer = try_program([*self._systemctl, "show", "--property=Version"], changes=self._changes)
        if answer.returncode != 0:
            reason = next(iter(answer.stderr.strip().splitlines()), f"exit status {answer.returncode}")
            raise GPUMeshError(
                f"the systemd of your user cannot be reached: {reason}",
                hint="log in as this user (not by su), or install a service of the system: `sudo gpumesh service "
                f"install --system`; {PRINT_HINT}",
            )

    def path(self, name: str) -> Path:
        folder = SYSTEM_FOLDER if self._system else environment.config_dir().parent / "systemd" / "user"
        return folder / _unit(name)

    def render(self, definition: ServiceDefinition) -> str:
        return make_unit(definition, systemd_version=_version())

    def origin(self, text: str | None) -> FileOrigin:
        return find_origin(text)

    def start(self, name: str, *, is_new: bool) -> None:
        self._run("daemon-reload")
        self._run("enable", _unit(name))
        self._run("restart" if is_new else "start", _unit(name))

    def stop(self, name: str) -> None:
        self._run("disable", "--now", _unit(name))

    def forget(self, name: str) -> None:
        self._run("daemon-reload")
        try_program([*self._systemctl, "reset-failed", _unit(name)], changes=self._changes)

    def state(self, name: str) -> ServiceState:
        """The state of the service as systemd tells it."""
        output = self._run("show", f"--property={','.join(_PROPERTIES)}", _unit(name))
        values = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        state = f"{values.get('ActiveState', 'unknown')} ({values.get('SubState', 'unknown')})"
        if values.get("Result", "success") != "success":
            state += f", last result: {values['Result']}"
        pid, restarts = values.get("MainPID", "0"), values.get("NRestarts", "")
        return ServiceState(
            state=state,
            is_active=values.get("ActiveState") == "active",
            starts_by_itself=values.get("UnitFileState") == "enabled",
            pid=int(pid) if pid.isdecimal() and pid != "0" else None,
            since=values.get("ActiveEnterTimestamp") or None,
            restarts=int(restarts) if restarts.isdecimal() else None,
        )

    def log_command(self, name: str) -> str:
        return f"journalctl {self._scope}-u {name}"

    def restart_command(self, name: str) -> str:
        return f"{'sudo ' if self._system else ''}systemctl {self._scope}restart {name}"

    def boot_remark(self) -> str | None:
        if self._system or (LINGER_FOLDER / environment.user()).exists():
            return None
        return "it runs only while you are logged in; `loginctl enable-linger` lets it start at boot and outlive logins"

    def _run(self, *arguments: str) -> str:
        return run_program([*self._systemctl, *arguments], changes=self._changes)

    @property
    def _scope(self) -> str:
        return "" if self._system else "--user "

    @property
    def _systemctl(self) -> list[str]:
        return ["systemctl", *self._scope.split(), "--no-pager"]

    @property
    def _changes(self) -> dict[str, str | None]:
        """Where the user's systemd listens, if the shell does not know it, as after `su -`."""
        if self._system or environment.get("XDG_RUNTIME_DIR") is not None:
            return {}
        return {"XDG_RUNTIME_DIR": f"/run/user/{os.geteuid()}"}


def _unit(name: str) -> str:
    return f"{name}.service"


def _version() -> int | None:
    """The version of the systemd of this machine; ``None`` where there is none."""
    if shutil.which("systemctl") is None:
        return None
    match = re.match(r"systemd (\d+)", try_program(["systemctl", "--version"]).stdout)
    return None if match is None else int(match[1])
