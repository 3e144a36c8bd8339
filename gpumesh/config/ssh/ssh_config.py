"""The settings of a ``Host`` in ``~/.ssh/config``, from the system's ssh (``ssh -G``), which knows Include, Match and
all defaults. Only without an installed ssh we read the plain parts of the files ourselves.

``ssh -G`` also prints defaults. The configured settings are the difference to its output without the files.
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
_LIMIT = 256 * 1024

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
    """``None`` and empty where nothing is configured. ``openssh_features``: used features that only transport openssh
    supports. ``configured``: whether anything is configured for the alias."""

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
    return _resolve_hops(_resolve(alias, home), home, 0)


def _resolve_hops(answer: AliasSettings, home: Path, depth: int) -> AliasSettings:
    """Also resolves the hosts of its ProxyJump: they may be aliases that have jump hosts themselves."""
    if depth >= _MAX_HOPS and answer.proxy_jump:
        raise ValueError(f"its ProxyJump goes on through more than {_MAX_HOPS} hosts")
    hops: list[str] = []
    needs = list(answer.openssh_features)
    for written in answer.proxy_jump:
        hop = written.strip().removeprefix("ssh://")
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", hop) is None:
            hops.append(hop)
            continue
        inner = _resolve_hops(_resolve(hop, home), home, depth + 1)
        host = f"[{inner.host}]" if ":" in inner.host else inner.host
        hops += inner.proxy_jump
        hops.append((f"{inner.user}@" if inner.user else "") + host + (f":{inner.port}" if inner.port else ""))
        needs += [need for need in inner.openssh_features if need not in needs]
        if inner.identity_files and inner.identity_files != answer.identity_files:
            needs.append(f"another key for {hop}")
    return replace(answer, proxy_jump=tuple(hops), openssh_features=tuple(needs))


def _resolve(alias: str, home: Path) -> AliasSettings:
    value_parsers.parse_alias(alias)
    if shutil.which("ssh") is None:
        return _settings_from_options(alias, ssh_files.read_host_options(alias, home), home)
    own = home / ".ssh" / "config"
    # ssh takes the home folder from passwd, not from HOME. If they differ, ssh gets the file as an option.
    other_home = home != _passwd_home() and own.is_file()
    configured = _ask_ssh(alias, ["-F", str(own)] if other_home else [])
    defaults = set(_ask_ssh(alias, ["-F", "none"]))
    pairs = [pair for pair in configured if pair not in defaults]
    # ssh's default user comes from passwd, ours from the environment. If they differ, the user that ssh prints may be
    # configured, and is the one that ssh would use.
    named = dict(configured).get("user")
    if named is not None and named != environment.user() and all(key != "user" for key, _ in pairs):
        pairs.append(("user", named))
    # ssh has already run the command of a Match exec; its result may be different at the next connection.
    pairs += [pair for pair in ssh_files.read_host_options(alias, home) if pair == ssh_files.MATCH_EXEC]
    return _settings_from_options(alias, pairs, home)


def _settings_from_options(alias: str, pairs: ssh_files.SshOptions, home: Path) -> AliasSettings:
    first: dict[str, str] = {}
    for key, value in pairs:
        first.setdefault(key, value)
    host = first.get("hostname", alias).replace("%%", "%").replace("%h", alias)
    needs = [name for key, name in _UNSUPPORTED.items() if first.get(key, "none").lower() != "none"]
    usual_agent = ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK", str(environment.ssh_auth_sock()))
    if "IdentityAgent" in needs and first["identityagent"] in usual_agent:
        needs.remove("IdentityAgent")
    tokens = {"%d": str(home), "%h": host, "%n": alias, "%r": first.get("user", ""), "%u": environment.user()}
    files = [
        _expand_tokens(value.strip('"'), tokens) for key, value in pairs if key == "identityfile" and value != "none"
    ]
    jump = first.get("proxyjump", "none")
    known = first.get("userknownhostsfile", "none").split()
    port = first.get("port", "")
    return AliasSettings(
        host=host,
        port=int(port) if port.isascii() and port.isdigit() else None,
        user=first.get("user"),
        identity_files=tuple(files),
        known_hosts=known[0] if known and known[0] not in ("none", "/dev/null") else None,
        proxy_jump=tuple(hop.strip() for hop in jump.split(",")) if jump.lower() != "none" else (),
        openssh_features=tuple(needs),
        configured=bool(pairs),
    )


def _expand_tokens(text: str, tokens: dict[str, str]) -> str:
    return re.sub(r"%.", lambda match: tokens.get(match[0], "%" if match[0] == "%%" else match[0]), text)


def _passwd_home() -> Path | None:
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):
        return None


def _ask_ssh(alias: str, options: list[str]) -> ssh_files.SshOptions:
    """Runs ``ssh -G``, which makes no connection. A ``Match exec`` runs the user's own command, as ssh itself would."""
    by_hand = paste_command("ssh -G {ALIAS}", ALIAS=alias)
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
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{by_hand} did not answer within {TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:  # not reaped yet, so the process id is still valid
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        printed = out.read(_LIMIT).decode("utf-8", "replace")
        complaint = err.read(2048).decode("utf-8", "replace")
    if status != 0:
        lines = ["".join(c if c.isprintable() else "?" for c in line) for line in complaint.splitlines() if line]
        raise ValueError(f"{by_hand} failed: {(lines or ['it says nothing'])[0][:200]}")
    return [ssh_files.parse_option_line(line) for line in printed.splitlines() if line.strip()]
