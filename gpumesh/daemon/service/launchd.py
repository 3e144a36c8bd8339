"""launchd, the manager of services on macOS: agents of our own user."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpumesh.config import environment
from gpumesh.daemon.service.definition import FileOrigin, ServiceDefinition, find_origin
from gpumesh.daemon.service.launchd_agent import COMMENT_END, label, make_agent
from gpumesh.daemon.service.managers import ServiceState, run_program, try_program

_STATE = re.compile(r"^\s*state = (.+)$", re.MULTILINE)
_PID = re.compile(r"^\s*pid = (\d+)$", re.MULTILINE)
_RUNS = re.compile(r"^\s*runs = (\d+)$", re.MULTILINE)


class Launchd:
    """A ``ServiceManager``."""

    def __repr__(self) -> str:
        return f"<Launchd {self._domain}>"

    def require_available(self) -> None:
        """launchd runs on each macOS."""

    def path(self, name: str) -> Path:
        return environment.home() / "Library" / "LaunchAgents" / f"{label(name)}.plist"

    def render(self, definition: ServiceDefinition) -> str:
        return make_agent(definition, log=self._log(definition.name))

    def origin(self, text: str | None) -> FileOrigin:
        return find_origin(text, comment_end=COMMENT_END)

    def start(self, name: str, *, is_new: bool) -> None:
        if is_new or not self._is_loaded(name):
            self.stop(name)
            run_program(["launchctl", "bootstrap", self._domain, str(self.path(name))])
        run_program(["launchctl", "enable", self._target(name)])
        run_program(["launchctl", "kickstart", self._target(name)])

    def stop(self, name: str) -> None:
        if self._is_loaded(name):
            run_program(["launchctl", "bootout", self._target(name)])

    def forget(self, name: str) -> None:
        """launchd knows only agents that were loaded: ``stop`` has done all."""

    def state(self, name: str) -> ServiceState:
        """The state of the service as launchd prints it."""
        done = try_program(["launchctl", "print", self._target(name)])
        if done.returncode != 0:
            return ServiceState("not loaded", is_active=False, starts_by_itself=False)
        state, pid, runs = (pattern.search(done.stdout) for pattern in (_STATE, _PID, _RUNS))
        return ServiceState(
            state="unknown" if state is None else state[1],
            is_active=state is not None and state[1] == "running",
            starts_by_itself=True,
            pid=None if pid is None else int(pid[1]),
            restarts=None if runs is None else max(int(runs[1]) - 1, 0),
        )

    def log_command(self, name: str) -> str:
        return f"tail -f {self._log(name)}"

    def restart_command(self, name: str) -> str:
        return f"launchctl kickstart -k {self._target(name)}"

    def boot_remark(self) -> str | None:
        return "it runs while you are logged in"

    def _is_loaded(self, name: str) -> bool:
        return try_program(["launchctl", "print", self._target(name)]).returncode == 0

    def _log(self, name: str) -> Path:
        return environment.home() / "Library" / "Logs" / f"{name}.log"

    def _target(self, name: str) -> str:
        return f"{self._domain}/{label(name)}"

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"
