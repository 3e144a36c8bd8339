"""Asks the system's ssh (``ssh -G``) for the settings of a ``Host`` (alias) in ``~/.ssh/config``, with its ProxyJump.

``ssh -G`` understands Include, Match and all defaults. Only where no ssh is installed, we read the plain parts of the
files ourselves (``ssh_files``). ``ssh -G`` also prints defaults: the configured settings are the lines that it prints
with the files, but not without them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpumesh.config import environment, value_parsers
from gpumesh.config.ssh import ssh_files
from gpumesh.config.ssh.known_hosts_option import split_files
from gpumesh.config.ssh.option_roles import find_ssh_only_name
from gpumesh.text.quoting import paste_command

TIMEOUT_S = 10.0  # for one run of ``ssh -G``
_MAX_HOPS = 4  # jump hosts in a row that have jump hosts themselves: hosts that name each other would never end
_MAX_OUTPUT_BYTES = 256 * 1024
_MAX_ERROR_BYTES = 2048
_JUMP = re.compile(r"(?:(?P<user>.+)@)?(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*)(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class AliasSettings:
    """The settings of an alias: ``None`` or empty where nothing is configured. ``openssh_features``: the features in
    use that only transport openssh supports. ``configured``: whether anything is configured for the alias.

    ``identity_files``: the tokens in them (%r, %p) are expanded with the settings here. ``raw_identity_files``: not
    expanded, for ``expand_identity_files``. ``no_identity_files``: not even ssh's default keys are tried.
    ``agent``: false if the keys of the agent are not tried. ``known_hosts``: the first file of UserKnownHostsFile;
    ``more_known_hosts``: its other files. ``accepts_new_keys``: StrictHostKeyChecking lets ssh connect to an unknown
    host. ``jump_aliases``: the settings of each of ``proxy_jump``; ``None`` for a host that is no alias.
    """

    host: str
    port: int | None = None
    user: str | None = None
    identity_files: tuple[str, ...] = ()
    known_hosts: str | None = None
    proxy_jump: tuple[str, ...] = ()
    openssh_features: tuple[str, ...] = ()
    configured: bool = True
    identities_only: bool = False
    agent: bool = True
    no_identity_files: bool = False
    raw_identity_files: tuple[str, ...] = field(default=(), compare=False)
    more_known_hosts: tuple[str, ...] = ()
    accepts_new_keys: bool = False
    alias: str = field(default="", compare=False)
    jump_aliases: tuple[AliasSettings | None, ...] = ()


def resolve_alias(alias: str, *, home: Path) -> AliasSettings:
    """Returns the settings of ``alias``, with the jump hosts resolved. ``home`` is the user's home folder.

    Raises ValueError with a sentence when ssh cannot read its configuration or is too slow.
    """
    return _resolve_jumps(_read_settings(alias, home), home, depth=0)


def _resolve_jumps(settings: AliasSettings, home: Path, depth: int) -> AliasSettings:
    """Returns the settings with each jump host resolved: a jump host may be an alias that has jump hosts itself.

    ``depth`` is the number of jump hosts that led to these settings. Raises ValueError as ``resolve_alias`` does.
    """
    if depth >= _MAX_HOPS and settings.proxy_jump:
        raise ValueError(f"its ProxyJump goes on through more than {_MAX_HOPS} hosts")
    jumps = resolve_jumps(settings.proxy_jump, lambda hop: _resolve_jumps(_read_settings(hop, home), home, depth + 1))
    features = dict.fromkeys((*settings.openssh_features, *jumps.openssh_features))
    return replace(
        settings, proxy_jump=jumps.proxy_jump, openssh_features=tuple(features), jump_aliases=jumps.jump_aliases
    )


def resolve_jumps(jumps: Iterable[str], resolve: Callable[[str], AliasSettings]) -> AliasSettings:
    """Resolves ``jumps``, the value of a ProxyJump, to hosts. Returns settings that have only these hosts and what
    follows from them. ``resolve`` returns the settings of a jump host, which may be an alias, with its own jump hosts
    resolved. Raises the ValueError of ``resolve``."""
    resolved_hops: list[str] = []
    aliases: list[AliasSettings | None] = []
    features: list[str] = []
    for configured_hop in jumps:
        hop = configured_hop.strip().removeprefix("ssh://")
        parts = _JUMP.fullmatch(hop)
        if parts is None:  # an IPv6 address
            resolved_hops.append(hop)
            aliases.append(None)
            continue
        hop_settings = resolve(parts["host"])
        hop_settings = replace(
            hop_settings,
            user=parts["user"] or hop_settings.user,
            port=int(parts["port"]) if parts["port"] else hop_settings.port,
        )
        resolved_hops += hop_settings.proxy_jump  # the hosts through which the hop itself is reached come before it
        resolved_hops.append(_format_hop(hop_settings))
        earlier_aliases = hop_settings.jump_aliases or (None,) * len(hop_settings.proxy_jump)
        aliases += [*earlier_aliases, hop_settings if hop_settings.configured else None]
        features += hop_settings.openssh_features
    return AliasSettings(
        "",
        proxy_jump=tuple(resolved_hops),
        openssh_features=tuple(dict.fromkeys(features)),
        jump_aliases=tuple(aliases) if any(aliases) else (),
    )


def _format_hop(hop: AliasSettings) -> str:
    """Returns the hop as ``[user@]host[:port]``."""
    text = f"[{hop.host}]" if ":" in hop.host else hop.host
    if hop.user:
        text = f"{hop.user}@{text}"
    if hop.port:
        text = f"{text}:{hop.port}"
    return text


def _read_settings(alias: str, home: Path) -> AliasSettings:
    """Returns the settings of ``alias``, with its ProxyJump as configured. Raises ValueError as ``resolve_alias``
    does."""
    value_parsers.parse_alias(alias)
    if shutil.which("ssh") is None:
        options = ssh_files.read_host_options(alias, home)
    else:
        options = _read_configured_options(alias, home)
    return _settings_from_options(alias, options, home)


def config_file_arguments(home: Path) -> list[str]:
    """The arguments with which ``ssh`` reads ``~/.ssh/config`` of this home folder; empty if it does that by itself.

    ssh takes the home folder from passwd, not from HOME. If they differ, ssh gets the file as an option.
    """
    config_file = home / ".ssh" / "config"
    if home == _passwd_home() or not config_file.is_file():
        return []
    return ["-F", str(config_file)]


def _read_configured_options(alias: str, home: Path) -> ssh_files.SshOptions:
    """Returns the options of ``alias`` that are configured, by ``ssh -G``, as pairs of key and value. ssh's defaults
    are left out."""
    effective = _run_ssh_g(alias, config_file_arguments(home))
    defaults = _run_ssh_g(alias, ["-F", "none"])
    configured = [option for option in effective if option not in defaults]
    # A list counts as a whole: one of ssh's default keys may be the only key of this alias.
    identity_files = [option for option in effective if option[0] == "identityfile"]
    if identity_files != [option for option in defaults if option[0] == "identityfile"]:
        configured = [option for option in configured if option[0] != "identityfile"] + identity_files
    # ssh's default user comes from passwd, ours from the environment. If they differ, we name the user as whom ssh
    # would log in: a configured user that equals ssh's default has been left out above.
    ssh_user = dict(effective).get("user")
    if ssh_user is not None and ssh_user != environment.user() and "user" not in dict(configured):
        configured.append(("user", ssh_user))
    # ssh has already run the command of a Match exec. Its result may be different at the next connection, so the alias
    # needs transport openssh, which lets ssh run the command each time.
    file_options = ssh_files.read_host_options(alias, home)
    configured += [option for option in file_options if option == ssh_files.MATCH_EXEC]
    return configured


def _settings_from_options(alias: str, options: ssh_files.SshOptions, home: Path) -> AliasSettings:
    """Returns the settings that these options of ``alias`` give: pairs of key and value, in the order of the files."""
    values: dict[str, str] = {}
    for key, value in options:
        values.setdefault(key, value)  # the first value of an option counts
    host = _expand_tokens(values.get("hostname", alias), {"%h": alias})
    # All values of IdentityFile count: ssh tries one key after the other.
    given_files = [value.strip('"') for key, value in options if key == "identityfile"]
    raw_files = tuple(path for path in given_files if path.lower() != "none")
    user = values.get("user") or environment.user()
    port_text = values.get("port", "")
    port = int(port_text) if port_text.isascii() and port_text.isdigit() else None
    jump = values.get("proxyjump", "none")
    hops = [] if jump.lower() == "none" else jump.split(",")
    tokens = _list_tokens(alias, home, host=host, port=port or 22, user=user)
    tokens["%k"] = values.get("hostkeyalias", alias)
    known_hosts = [_expand(file, tokens) for file in split_files(values.get("userknownhostsfile", ""))]
    return AliasSettings(
        host=host,
        port=port,
        user=values.get("user"),
        identity_files=expand_identity_files(raw_files, alias, home, host=host, port=port or 22, user=user),
        known_hosts=known_hosts[0] if known_hosts else None,
        proxy_jump=tuple(hop.strip() for hop in hops),
        openssh_features=_find_unsupported_features(values),
        configured=bool(options),
        identities_only=values.get("identitiesonly", "no").lower() in ("yes", "true"),
        agent=values.get("identityagent", "").lower() != "none",
        no_identity_files=bool(given_files) and not raw_files,
        raw_identity_files=raw_files,
        more_known_hosts=tuple(known_hosts[1:]),
        accepts_new_keys=values.get("stricthostkeychecking", "ask").lower() in ("accept-new", "no", "off", "false"),
        alias=alias,
    )


def expand_identity_files(
    paths: Iterable[str], alias: str, home: Path, *, host: str, port: int, user: str
) -> tuple[str, ...]:
    """Returns the values of IdentityFile with their tokens and variables expanded, as ssh expands them for a connection
    to ``host`` and ``port`` as ``user``. A variable that is not set stays as it is: ssh would not connect."""
    tokens = _list_tokens(alias, home, host=host, port=port, user=user)
    return tuple(_expand(path, tokens) for path in paths)


def _list_tokens(alias: str, home: Path, *, host: str, port: int, user: str) -> dict[str, str]:
    """The tokens of ssh_config(5), for a connection to ``host`` and ``port`` as ``user``, without %C and %j."""
    own_name = socket.gethostname()
    return {
        "%d": str(home),
        "%h": host,
        "%i": str(os.getuid()) if hasattr(os, "getuid") else "",
        "%k": alias,
        "%L": own_name.split(".", 1)[0],
        "%l": own_name,
        "%n": alias,
        "%p": str(port),
        "%r": user,
        "%u": environment.user(),
    }


def _expand(path: str, tokens: dict[str, str]) -> str:
    """Returns ``path`` with tokens and variables expanded. A variable that is not set stays."""
    variables = environment.child_environment()  # as our ssh gets them
    return re.sub(r"\$\{(\w+)\}", lambda match: variables.get(match[1], match[0]), _expand_tokens(path, tokens))


def _find_unsupported_features(values: dict[str, str]) -> tuple[str, ...]:
    """Returns the names of the options in ``values`` that transport sshtunnel does not support."""
    features = ["Match exec"] if ssh_files.MATCH_EXEC_KEY in values else []
    ssh_only_names = (find_ssh_only_name(key, value) for key, value in values.items())
    features += [name for name in ssh_only_names if name is not None]
    # An IdentityAgent with one of these values is the agent that sshtunnel uses, too.
    usual_agent_values = ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK", str(environment.ssh_auth_sock()))
    if values.get("identityagent") in usual_agent_values and "IdentityAgent" in features:
        features.remove("IdentityAgent")
    return tuple(features)


def _expand_tokens(text: str, tokens: dict[str, str]) -> str:
    """Replaces ``%h`` and the like (TOKENS in ssh_config(5)) by their values in ``tokens``. Unknown tokens stay."""
    expansions = {**tokens, "%%": "%"}
    return re.sub(r"%.", lambda match: expansions.get(match[0], match[0]), text)


def _passwd_home() -> Path | None:
    """Our user's home folder by passwd; ``None`` on Windows, and for a user without an entry in passwd."""
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):  # Windows has no pwd; a container may run with a uid that has no entry
        return None


def _run_ssh_g(alias: str, options: list[str]) -> ssh_files.SshOptions:
    """Returns the options of ``alias`` that ``ssh -G`` prints, defaults too, as pairs of key and value.

    ``ssh -G`` makes no connection. Without -N it refuses an alias that forks into the background. A ``Match exec``
    runs the user's own command, as ssh itself would. Raises ValueError when ssh fails or does not answer within
    ``TIMEOUT_S``.
    """
    shown_command = paste_command("ssh -G {ALIAS}", ALIAS=alias)
    # Files instead of pipes: a process that a Match exec leaves behind could keep a pipe open for ever.
    with tempfile.TemporaryFile() as stdout_file, tempfile.TemporaryFile() as stderr_file:
        try:
            process = subprocess.Popen(
                ["ssh", "-N", "-G", *options, "--", alias],
                stdin=subprocess.DEVNULL,
                stdout=stdout_file,
                stderr=stderr_file,
                env=environment.child_environment(),
                start_new_session=True,  # a process group of its own, so that killpg also ends a Match exec's command
            )
        except OSError as error:
            raise ValueError(f"cannot run ssh: {error.strerror}") from error
        try:
            exit_status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{shown_command} did not answer within {TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:  # not reaped yet, so the process id is still valid
                with contextlib.suppress(ProcessLookupError, PermissionError):  # the processes have ended meanwhile
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stdout_file.seek(0)
        stderr_file.seek(0)
        output = stdout_file.read(_MAX_OUTPUT_BYTES).decode("utf-8", "replace")
        error_output = stderr_file.read(_MAX_ERROR_BYTES).decode("utf-8", "replace")
    if exit_status != 0:
        raise ValueError(f"{shown_command} failed: {_first_line(error_output) or 'it says nothing'}")
    return [ssh_files.parse_option_line(line) for line in output.splitlines() if line.strip()]


def _first_line(text: str) -> str:
    """Returns the first line that is not empty, with ``?`` for characters that are not safe to print, cut to 200
    characters. Returns an empty text if there is no such line."""
    lines = [line for line in text.splitlines() if line]
    if not lines:
        return ""
    return "".join(character if character.isprintable() else "?" for character in lines[0])[:200]
