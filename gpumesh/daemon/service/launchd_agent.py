"""The text of an agent for launchd, which keeps programs up on macOS. Pure.

launchd has nothing like systemd's ``EnvironmentFile``, and the variables' values must not stand in the agent, which
others can read. So a shell reads them and then becomes the mesh.
"""

from __future__ import annotations

import plistlib
from pathlib import Path

from gpumesh.daemon.service.definition import ServiceDefinition, signature
from gpumesh.daemon.service.systemd_unit import STOP_S

COMMENT_END = " -->"
# The shell gets the file as $0 and the program as its arguments, so nothing in their names is read as a command.
_START = 'if [ -r "$0" ]; then set -a; . "$0"; set +a; fi; exec "$@"'


def label(name: str) -> str:
    """The name under which launchd knows the service."""
    return f"io.{name}"


def make_agent(definition: ServiceDefinition, *, log: Path) -> str:
    """Returns the text of the agent. What the mesh prints before its own log is open goes to ``log``."""
    agent = {
        "Label": label(definition.name),
        "ProgramArguments": [
            *("/bin/sh", "-c", _START, str(definition.variables_file)),
            *(*definition.program, "up", "--quiet"),
        ],
        "EnvironmentVariables": {"GPUMESH_CONFIG": str(definition.config)},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 1,
        "ExitTimeOut": STOP_S,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 65536},
        "StandardErrorPath": str(log),
    }
    head, _, body = plistlib.dumps(agent, sort_keys=False).decode().partition("\n")
    return f"{head}\n<!-- {signature(body)}{COMMENT_END}\n{body}"
