"""Makes the command lines of ``ssh``: of the master, of its clients, for jump hosts, and to fetch a host's key.

No secret is in any argument: prompts.py answers ssh's questions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from gpumesh.config import environment
from gpumesh.config.ssh import ssh_config
from gpumesh.errors import KeyUnreadable
from gpumesh.text.addresses import format_address
from gpumesh.text.printable import printable
from gpumesh.text.quoting import shell_words
from gpumesh.topology import HostKeyPolicy, SshSpec
from gpumesh.tunnels.hostkeys import choose_ssh_alias, host_key_algorithms
from gpumesh.tunnels.jump_hosts import list_hops, split_jump
from gpumesh.tunnels.known_hosts import read_known_hosts
from gpumesh.tunnels.openssh.fixed_options import FIXED_OPTIONS
from gpumesh.tunnels.openssh.ssh_output import BANNER_LOG, GREETING_LOG, HOST_DEBUG_LOG, LOGIN_LOG, log_path
from gpumesh.tunnels.transport import ConnectRequest

CLIENT_HOST = "gpumesh"  # clients of the control socket need some host name; they ask the master, never DNS


def master_command(
    setup: ConnectRequest,
    control: Path,
    *,
    batch: bool,
    session: bool,
    unknown: Collection[str] = (),
    named_keys_only: bool = False,
) -> list[str]:
    """The command line of the master. ``session``: its own session runs ``cat`` on the host (connection.py).

    ``batch``: ssh asks no questions. ``unknown``: options, in lower case, that this ssh does not know.
    ``named_keys_only``: no other key of the agent is tried. Raises ``HostKeyRevoked`` and ``KeyUnreadable``.
    """
    ssh = setup.ssh
    options = _connect_options(ssh, batch=batch) | {
        # LOGIN_LOG is not for jump hosts, whose logins would count as the master's.
        "LogVerbose": ",".join(
            [GREETING_LOG, BANNER_LOG, LOGIN_LOG, *([HOST_DEBUG_LOG] if setup.reverse_forwards else [])]
        ),
        "ControlMaster": "yes",
        "ControlPath": quote_option_path(control),
        "ServerAliveInterval": "1",  # ssh gives up after 4 s. Only a reserve: the supervisor pings through the session
        "ServerAliveCountMax": "3",
        "ExitOnForwardFailure": "yes",
        "StreamLocalBindMask": "0177",  # the sockets of forwards get the mode 0600
        "StreamLocalBindUnlink": "yes",
        "HostName": ssh.host,  # and not what ~/.ssh/config has for the alias
        **(PASSWORD_OPTIONS if "password" in dict(setup.secrets) else {}),
    }
    if named_keys_only:
        options["IdentitiesOnly"] = "yes"
    if not session:
        options["SessionType"] = "none"
    alias = choose_ssh_alias(setup.known_host, ssh)
    if alias is not None:
        options["HostKeyAlias"] = alias
    arguments = [*option_arguments(options, unknown), *identity_arguments(ssh)]
    log = log_path(control)
    arguments += _jump_arguments(ssh, batch=batch, unknown=unknown, log=log, named_keys_only=named_keys_only)
    arguments += ["-p", str(ssh.port), "-l", ssh.user]
    if session:
        return ["ssh", *file_arguments(log), *arguments, "--", ssh.alias or ssh.host, "exec cat"]
    return ["ssh", *file_arguments(log), *arguments, "-N", "--", ssh.alias or ssh.host]


def host_key_command(
    setup: ConnectRequest, known_hosts: Path, *, batch: bool, unknown: Collection[str] = (), log: Path | None = None
) -> list[str]:
    """The command line of an ``ssh`` that writes the host's key to ``known_hosts`` and ends before any login.
    ``unknown`` is as for ``master_command``. ``log``: the FIFO for its log."""
    ssh = setup.ssh
    options = _common_options(ssh, batch=batch) | {
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": quote_option_path(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "KnownHostsCommand": "none",  # a key that it knows would not be written
        "HashKnownHosts": "no",
        "HostKeyAlias": CLIENT_HOST,  # any name: the file is new, and gets one line
        "PreferredAuthentications": "none",  # ssh ends before it tries any login
        "HostName": ssh.host,
    }
    key_types = read_known_hosts(*ssh.known_hosts_files).key_types(setup.known_host)
    if key_types:
        # ^: these come first, and the other algorithms stay allowed.
        options["HostKeyAlgorithms"] = "^" + ",".join(host_key_algorithms(key_types))
    arguments = [*option_arguments(options, unknown), *_jump_arguments(ssh, batch=batch, unknown=unknown, log=log)]
    arguments += ["-p", str(ssh.port), "-l", ssh.user]
    return ["ssh", *file_arguments(log), "-T", *arguments, "--", ssh.alias or ssh.host, "exit"]


def jump_command(
    ssh: SshSpec,
    *,
    batch: bool,
    unknown: Collection[str] = (),
    log: Path | None = None,
    named_keys_only: bool = False,
) -> str:
    """The chain of jump hosts as a value of ProxyCommand; "" without jump hosts. ``named_keys_only`` is as for
    ``master_command``.

    For one jump host it is ``ssh -o NAME=VALUE … -l USER -p PORT -W '[%h]:%p' -- HOST``. If that jump host is reached
    through an earlier jump host, this ``ssh`` has an option ProxyCommand, whose value is the command for the earlier
    one.

    ``-J`` is not used: with it, ssh would not use our known_hosts, keys and policy for the jump hosts.
    """

    def hop_options(hop: SshSpec) -> dict[str, str]:
        options = _connect_options(hop, batch=batch)
        return options | {"IdentitiesOnly": "yes"} if named_keys_only else options

    return chain_jumps(ssh, hop_options, unknown=unknown, log=log)


def chain_jumps(
    ssh: SshSpec,
    hop_options: Callable[[SshSpec], Mapping[str, str]],
    *,
    unknown: Collection[str] = (),
    log: Path | None = None,
) -> str:
    """The value of ProxyCommand that ``jump_command`` describes; "" without jump hosts. ``hop_options`` returns the
    options for a jump host."""
    command = ""  # the ProxyCommand that connects to the next host of the route; "": that host is reached directly
    *hops, _node_host = list_hops(ssh)
    for hop, jump in zip(hops, ssh.proxy_jump, strict=True):
        user, host, port = split_jump(jump, default_user="")  # "": without a user, ssh takes its own default
        options = dict(hop_options(hop))
        if hop.alias is not None:
            # ssh gets the alias as the host, so that it applies the alias's section of the user's ssh_config.
            options["HostName"] = host
            host = hop.alias
        arguments = ["ssh", *file_arguments(log), *option_arguments(options, unknown), *identity_arguments(hop)]
        if command:
            arguments += proxy_arguments(command)
        if user:
            arguments += ["-l", user]
        if port != 22:
            arguments += ["-p", str(port)]
        # The ssh that runs this command expands percent signs once. It may expand only ``%h`` and ``%p`` after -W.
        escaped = [argument.replace("%", "%%") for argument in arguments]
        command = shell_words([*escaped, "-W"]) + " '[%h]:%p' " + shell_words(["--", host.replace("%", "%%")])
    return command


def client_command(control: Path, *arguments: str) -> list[str]:
    """The command line of a client of the control socket ``control``, with ``arguments`` at its end.

    Its ProxyCommand always fails, so that a client that finds no master does not connect by itself.
    """
    options = {
        "ControlMaster": "no",
        "ControlPath": quote_option_path(control),
        "ProxyCommand": "false",
        "LogLevel": "INFO",
    }
    return ["ssh", "-F", "none", "-T", *option_arguments(options), *arguments]


def _common_options(ssh: SshSpec, *, batch: bool) -> dict[str, str]:
    """Options of every ssh that connects."""
    return {
        **FIXED_OPTIONS,
        "LogVerbose": f"{GREETING_LOG},{BANNER_LOG}",
        "ControlMaster": "no",
        "ControlPath": "none",
        "BatchMode": "yes" if batch else "no",
        "ConnectTimeout": str(max(1, round(ssh.connect_timeout_s))),  # ssh takes whole seconds
    }


def _connect_options(ssh: SshSpec, *, batch: bool) -> dict[str, str]:
    """Options of every ssh that checks a host's key and logs in."""
    return _common_options(ssh, batch=batch) | login_options(ssh)


def login_options(ssh: SshSpec) -> dict[str, str]:
    """Options that say which host keys are trusted, and which of our keys are tried."""
    options = {
        "StrictHostKeyChecking": "accept-new" if ssh.host_key_policy is HostKeyPolicy.ACCEPT_NEW else "yes",
        "UserKnownHostsFile": " ".join(quote_option_path(file.expanduser()) for file in ssh.known_hosts_files),
    }
    if not ssh.agent:
        options |= {"IdentitiesOnly": "yes", "IdentityAgent": "none"}
    elif ssh.identities_only:
        options["IdentitiesOnly"] = "yes"
    return options


# Options for a password that mesh.yaml names: it is tried even if the user's files forbid passwords in general.
PASSWORD_OPTIONS: Mapping[str, str] = {
    "PasswordAuthentication": "yes",
    "KbdInteractiveAuthentication": "yes",
    "PreferredAuthentications": "gssapi-with-mic,hostbased,publickey,keyboard-interactive,password",  # ssh's own
}


def file_arguments(log: Path | None) -> list[str]:
    """The files of an ``ssh`` as its arguments: its log, if it has one, and the user's ssh_config, which must be the
    file from which config/ssh has read the alias."""
    arguments = [] if log is None else ["-E", str(log)]
    return [*arguments, *ssh_config.config_file_arguments(environment.home())]


def option_arguments(options: Mapping[str, str], unknown: Collection[str] = ()) -> list[str]:
    """The options as arguments of ``ssh``: ``-o`` and ``NAME=VALUE`` for each, without those that are ``unknown``."""
    arguments: list[str] = []
    for name, value in options.items():
        if name.lower() not in unknown:
            arguments += ["-o", f"{name}={value}"]
    return arguments


def identity_arguments(ssh: SshSpec) -> list[str]:
    """The key files as arguments of ``ssh``. For an alias, a path with a variable is left out, because ssh finds that
    path in ~/.ssh/config."""
    # ssh would offer the same key twice, and each offer is one of MaxAuthTries. But in a file of another home folder,
    # it does not find keys in ``~`` or %d.
    if ssh.keys_of_alias and not ssh_config.config_file_arguments(environment.home()):
        return []
    arguments: list[str] = []
    for file in ssh.identity_files:
        path = file.expanduser()
        if ssh.alias is not None and "${" in str(path):
            continue
        arguments += ["-o", f"IdentityFile={quote_option_path(path)}"]
    return arguments


def _jump_arguments(
    ssh: SshSpec, *, batch: bool, unknown: Collection[str], log: Path | None, named_keys_only: bool = False
) -> list[str]:
    """The jump hosts as arguments of ``ssh``; empty without jump hosts."""
    if not ssh.proxy_jump:
        return []
    return proxy_arguments(jump_command(ssh, batch=batch, unknown=unknown, log=log, named_keys_only=named_keys_only))


def proxy_arguments(command: str) -> list[str]:
    """A ProxyCommand of ours as arguments of ``ssh``. It passes bytes, not a descriptor."""
    return ["-o", f"ProxyCommand={command}", "-o", "ProxyUseFdpass=no"]


def quote_option_path(path: Path) -> str:
    """Quotes a path as the value of an option, because ssh splits values at spaces and expands percent signs.

    ssh also expands variables. ``${`` cannot be quoted, and ssh's error would show the variable's value. So a path with
    ``${`` raises ``KeyUnreadable``.
    """
    if "${" in str(path):
        raise KeyUnreadable(
            f"the path {printable(str(path))} holds ${{, which ssh would take for a variable",
            hint="give the file or its folder another name",
        )
    return '"' + str(path).replace("%", "%%") + '"'


def format_destination(ssh: SshSpec) -> str:
    """The name of the host for messages; safe to print."""
    return printable(ssh.alias or format_address(ssh.host, ssh.port))
