"""The text of a unit for systemd. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from gpumesh.daemon.service.definition import ServiceDefinition, signature
from gpumesh.daemon.shutdown import DRAIN_S

RESTART_MS = 500  # after a crash; the start itself takes another second
STOP_S = int(DRAIN_S) + 20  # draining, and closing the tunnels
START_S = 60
WATCHDOG_S = 60  # an event loop that is silent for so long hangs
FIRST_VERSION_WITH_STEPS = 254  # of systemd, which can wait longer and longer between restarts

# What a mesh never does. None of it may hinder ssh: its agents and sockets in /tmp, its keys in the home and on FIDO
# devices, and the programs of ProxyCommand. Those of the second list cannot be had by a user's own manager.
_HARDENING = (
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
)
_SYSTEM_HARDENING = (
    "ProtectSystem=full",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
)


def make_unit(definition: ServiceDefinition, *, systemd_version: int | None = None) -> str:
    """Returns the text of the unit. ``systemd_version``: of the systemd that will read it; ``None``: not known."""
    body = "\n".join(_lines(definition, systemd_version)) + "\n"
    return f"# {signature(body)}\n{body}"


def _lines(definition: ServiceDefinition, systemd_version: int | None) -> Iterator[str]:
    """The lines of the unit file. ``systemd_version``: ``None`` if unknown; then newer settings are left out."""
    is_system = definition.user is not None
    yield "[Unit]"
    yield "Description=GPUs behind SSH as one endpoint (gpumesh)"
    if is_system:
        yield "Wants=network-online.target"
        yield "After=network-online.target"
    yield "# No network at boot is no reason to fail, and a mesh that crashes is started again however often it does."
    yield "StartLimitIntervalSec=0"
    yield ""
    yield "[Service]"
    yield "Type=notify"
    if definition.user is not None:
        yield f"User={definition.user}"
        yield "WorkingDirectory=~"
    yield f"Environment={_word(f'GPUMESH_CONFIG={definition.config}')}"
    yield "# The variables that mesh.yaml names (passwords, API keys), one NAME=value a line, mode 0600."
    yield f"EnvironmentFile=-{_escape_specifiers(str(definition.variables_file))}"
    yield f"ExecStart={_command(*definition.program, 'up', '--quiet')}"
    yield "# Not SIGHUP, which would do the same: this ends when it is done, and fails if mesh.yaml is broken."
    yield f"ExecReload={_command(*definition.program, 'reload')}"
    yield f"TimeoutStartSec={START_S}"
    yield "# SIGTERM goes to the mesh alone, which drains and closes its tunnels."
    yield "KillMode=mixed"
    yield f"TimeoutStopSec={STOP_S}"
    yield "# `gpumesh down` ends it with 0, and it stays down. 2: mesh.yaml is wrong, and will be wrong again."
    yield "Restart=on-failure"
    yield "RestartPreventExitStatus=2"
    yield f"RestartSec={RESTART_MS}ms"
    if systemd_version is not None and systemd_version >= FIRST_VERSION_WITH_STEPS:
        yield "RestartSteps=6"
        yield "RestartMaxDelaySec=30"
    yield f"WatchdogSec={WATCHDOG_S}"
    yield "LimitNOFILE=65536"
    yield from _HARDENING
    if is_system:
        yield from _SYSTEM_HARDENING
    yield ""
    yield "[Install]"
    yield f"WantedBy={'multi-user' if is_system else 'default'}.target"


def _command(*words: str) -> str:
    """A command line of a unit."""
    return " ".join(_word(word).replace("$", "$$") for word in words)


def _word(text: str) -> str:
    """One word of a line of a unit, in quotes where necessary."""
    escaped = _escape_specifiers(text.replace("\\", "\\\\").replace('"', '\\"'))
    is_plain = escaped == text and not any(character.isspace() or character in "';" for character in text)
    return text if is_plain else f'"{escaped}"'


def _escape_specifiers(text: str) -> str:
    return text.replace("%", "%%")
