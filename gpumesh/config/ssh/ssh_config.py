"""What ``~/.ssh/config`` says about a ``Host``: asked of the system's ssh (``ssh -G``), which knows Include, Match and
every default; read by ourselves, in its plain parts, only where there is no ssh.

``ssh -G`` prints defaults too. What the files configure is the difference to what it prints without them.
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

# What transport sshtunnel cannot do, with what to call it. Values that mean "not set" do not count.
_NEEDS = {
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
    """``None`` and empty where nothing is configured. ``openssh_features``: the features that only transport openssh
    has. ``configured``: whether anything at all is configured for it."""

    host: str
    port: int | None = None
    user: str | None = None
    identity_files: tuple[str, ...] = ()
    known_hosts: str | None = None
    proxy_jump: tuple[str, ...] = ()
    openssh_features: tuple[str, ...] = ()
    configured: bool = True


def resolve_alias(alias: str, *, home: Path) -> AliasSettings:
    """Raises ValueError with a sentence when ssh cannot read its configuration, or does not answer in time."""
    return _with_hops(_resolve(alias, home), home, 0)


def _with_hops(answer: AliasSettings, home: Path, depth: int) -> AliasSettings:
    """The hosts of its ProxyJump are looked up as well: they may be aliases, with jumps of their own."""
    if depth >= _MAX_HOPS and answer.proxy_jump:
        raise ValueError(f"its ProxyJump goes on through more than {_MAX_HOPS} hosts")
    hops: list[str] = []
    needs = list(answer.openssh_features)
    for written in answer.proxy_jump:
        hop = written.strip().removeprefix("ssh://")
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", hop) is None:
            hops.append(hop)
            continue
        inner = _with_hops(_resolve(hop, home), home, depth + 1)
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
        return _answer(alias, ssh_files.read_host_options(alias, home), home)
    own = home / ".ssh" / "config"
    # ssh takes the home from passwd, not from HOME: where they differ, it is told the file.
    elsewhere = home != _passwd_home() and own.is_file()
    configured = _ask_ssh(alias, ["-F", str(own)] if elsewhere else [])
    defaults = set(_ask_ssh(alias, ["-F", "none"]))
    pairs = [pair for pair in configured if pair not in defaults]
    # Its default is the user that passwd names; ours is the one that the environment names. Where they differ, what it
    # says may have been configured, and is what it would do.
    named = dict(configured).get("user")
    if named is not None and named != environment.user() and all(key != "user" for key, _ in pairs):
        pairs.append(("user", named))
    # ssh has run the command of a Match exec by now, and its answer may be another at the next connection.
    pairs += [pair for pair in ssh_files.read_host_options(alias, home) if pair == ssh_files.MATCH_EXEC]
    return _answer(alias, pairs, home)


def _answer(alias: str, pairs: ssh_files.SshOptions, home: Path) -> AliasSettings:
    first: dict[str, str] = {}
    for key, value in pairs:
        first.setdefault(key, value)
    host = first.get("hostname", alias).replace("%%", "%").replace("%h", alias)
    needs = [name for key, name in _NEEDS.items() if first.get(key, "none").lower() != "none"]
    usual_agent = ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK", str(environment.ssh_auth_sock()))
    if "IdentityAgent" in needs and first["identityagent"] in usual_agent:
        needs.remove("IdentityAgent")
    tokens = {"%d": str(home), "%h": host, "%n": alias, "%r": first.get("user", ""), "%u": environment.user()}
    files = [_tokens(value.strip('"'), tokens) for key, value in pairs if key == "identityfile" and value != "none"]
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


def _tokens(text: str, tokens: dict[str, str]) -> str:
    return re.sub(r"%.", lambda match: tokens.get(match[0], "%" if match[0] == "%%" else match[0]), text)


def _passwd_home() -> Path | None:
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):
        return None


def _ask_ssh(alias: str, options: list[str]) -> ssh_files.SshOptions:
    """``ssh -G`` connects to nobody. A ``Match exec`` runs the user's own command, as ``ssh`` itself would."""
    by_hand = paste_command("ssh -G {ALIAS}", ALIAS=alias)
    # Files, not pipes: what a Match exec leaves running could hold a pipe open for ever.
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
            if process.returncode is None:  # not reaped, so the number is still its own
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
