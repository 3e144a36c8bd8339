"""Asks the system's ssh (``ssh -G``) for the settings of a ``Host`` in ``~/.ssh/config``: it knows Include, Match and
all defaults. Only where no ssh is installed we read the plain parts of the files ourselves.

``ssh -G`` also prints defaults. The configured settings are the lines that it does not print without the files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from gpumesh.config import environment, value_parsers
from gpumesh.config.ssh import ssh_files
from gpumesh.quoting import paste_command

TIMEOUT_S = 10.0
_MAX_HOPS = 4
_MAX_OUTPUT_BYTES = 256 * 1024
_MAX_ERROR_BYTES = 2048

# Options that transport sshtunnel does not support, and their names. Values that mean "not set" do not count.
_UNSUPPORTED = {
    ssh_files.MATCH_EXEC[0]: "Match exec",
    "proxycommand": "ProxyCommand",
    "identityagent": "IdentityAgent",
    "certificatefile": "CertificateFile",
    "pkcs11provider": "PKCS11Provider",
    "securitykeyprovider": "SecurityKeyProvider",
    "hostkeyalias": "HostKeyAlias",
    "knownhostscommand": "KnownHostsCommand",
    "bindaddress": "BindAddress",
    "bindinterface": "BindInterface",
}


@dataclass(frozen=True, slots=True)
class AliasSettings:
    """The settings of an alias: ``None`` or empty where nothing is configured. ``openssh_features``: the features in
    use that only transport openssh supports. ``configured``: whether anything is configured for the alias."""

    host: str
    port: int | None = None
    user: str | None = None
    identity_files: tuple[str, ...] = ()
    known_hosts: str | None = None
    proxy_jump: tuple[str, ...] = ()
    openssh_features: tuple[str, ...] = ()
    configured: bool = True


def resolve_alias(alias: str, *, home: Path) -> AliasSettings:
    """The settings of ``alias``. Raises ValueError with a sentence when ssh cannot read its configuration or is too
    slow."""
    return _resolve_jumps(_read_settings(alias, home), home, 0)


def _resolve_jumps(settings: AliasSettings, home: Path, depth: int) -> AliasSettings:
    """The settings with the hosts of their ProxyJump resolved: a jump host may be an alias that has jump hosts
    itself."""
    if depth >= _MAX_HOPS and settings.proxy_jump:
        raise ValueError(f"its ProxyJump goes on through more than {_MAX_HOPS} hosts")
    resolved: list[str] = []
    features = list(settings.openssh_features)
    for configured_hop in settings.proxy_jump:
        hop = configured_hop.strip().removeprefix("ssh://")
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", hop) is None:  # user@host or host:port, so not an alias
            resolved.append(hop)
            continue
        hop_settings = _resolve_jumps(_read_settings(hop, home), home, depth + 1)
        resolved += hop_settings.proxy_jump
        resolved.append(_format_hop(hop_settings))
        features += [feature for feature in hop_settings.openssh_features if feature not in features]
        if hop_settings.identity_files and hop_settings.identity_files != settings.identity_files:
            features.append(f"another key for {hop}")
    return replace(settings, proxy_jump=tuple(resolved), openssh_features=tuple(features))


def _format_hop(hop: AliasSettings) -> str:
    """``[user@]host[:port]``"""
    host = f"[{hop.host}]" if ":" in hop.host else hop.host
    return (f"{hop.user}@" if hop.user else "") + host + (f":{hop.port}" if hop.port else "")


def _read_settings(alias: str, home: Path) -> AliasSettings:
    """The settings of ``alias`` with its ProxyJump as configured."""
    value_parsers.parse_alias(alias)
    if shutil.which("ssh") is None:
        return _settings_from_options(alias, ssh_files.read_host_options(alias, home), home)
    config_file = home / ".ssh" / "config"
    # ssh takes the home folder from passwd, not from HOME. If they differ, ssh gets the file as an option.
    is_other_home = home != _passwd_home() and config_file.is_file()
    effective = _run_ssh_g(alias, ["-F", str(config_file)] if is_other_home else [])
    defaults = set(_run_ssh_g(alias, ["-F", "none"]))
    pairs = [pair for pair in effective if pair not in defaults]
    # ssh's default user comes from passwd, ours from the environment. If they differ, the user that ssh prints may be
    # configured, and is the user that ssh would log in as.
    ssh_user = dict(effective).get("user")
    if ssh_user is not None and ssh_user != environment.user() and all(key != "user" for key, _ in pairs):
        pairs.append(("user", ssh_user))
    # ssh has already run the command of a Match exec; its result may be different at the next connection.
    pairs += [pair for pair in ssh_files.read_host_options(alias, home) if pair == ssh_files.MATCH_EXEC]
    return _settings_from_options(alias, pairs, home)


def _settings_from_options(alias: str, pairs: ssh_files.SshOptions, home: Path) -> AliasSettings:
    values: dict[str, str] = {}
    for key, value in pairs:
        values.setdefault(key, value)  # the first value of an option counts
    host = values.get("hostname", alias).replace("%%", "%").replace("%h", alias)
    features = [name for key, name in _UNSUPPORTED.items() if values.get(key, "none").lower() != "none"]
    default_agent = ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK", str(environment.ssh_auth_sock()))
    if "IdentityAgent" in features and values["identityagent"] in default_agent:
        features.remove("IdentityAgent")
    tokens = {"%d": str(home), "%h": host, "%n": alias, "%r": values.get("user", ""), "%u": environment.user()}
    identity_files = [
        _expand_tokens(value.strip('"'), tokens) for key, value in pairs if key == "identityfile" and value != "none"
    ]
    jump = values.get("proxyjump", "none")
    known_hosts = values.get("userknownhostsfile", "none").split()
    port = values.get("port", "")
    return AliasSettings(
        host=host,
        port=int(port) if port.isascii() and port.isdigit() else None,
        user=values.get("user"),
        identity_files=tuple(identity_files),
        known_hosts=known_hosts[0] if known_hosts and known_hosts[0] not in ("none", "/dev/null") else None,
        proxy_jump=tuple(hop.strip() for hop in jump.split(",")) if jump.lower() != "none" else (),
        openssh_features=tuple(features),
        configured=bool(pairs),
    )


def _expand_tokens(text: str, tokens: dict[str, str]) -> str:
    """Expands ``%h`` and the like (TOKENS in ssh_config(5)). Unknown tokens stay."""
    expansions = {**tokens, "%%": "%"}
    return re.sub(r"%.", lambda match: expansions.get(match[0], match[0]), text)


def _passwd_home() -> Path | None:
    """Our user's home folder by passwd; ``None`` on Windows, and for a user without an entry."""
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):
        return None


def _run_ssh_g(alias: str, options: list[str]) -> ssh_files.SshOptions:
    """Runs ``ssh -G``, which makes no connection. A ``Match exec`` runs the user's own command, as ssh itself would."""
    shown_command = paste_command("ssh -G {ALIAS}", ALIAS=alias)
    # Files instead of pipes: a process that a Match exec leaves behind could keep a pipe open for ever.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                ["ssh", "-G", *options, "--", alias],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment.child_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise ValueError(f"cannot run ssh: {error.strerror}") from error
        try:
            exit_status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{shown_command} did not answer within {TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:  # not reaped yet, so the process id is still valid
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        output = out.read(_MAX_OUTPUT_BYTES).decode("utf-8", "replace")
        errors = err.read(_MAX_ERROR_BYTES).decode("utf-8", "replace")
    if exit_status != 0:
        lines = ["".join(c if c.isprintable() else "?" for c in line) for line in errors.splitlines() if line]
        raise ValueError(f"{shown_command} failed: {(lines or ['it says nothing'])[0][:200]}")
    return [ssh_files.parse_option_line(line) for line in output.splitlines() if line.strip()]
