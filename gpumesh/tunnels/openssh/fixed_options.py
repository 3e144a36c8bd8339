"""The options that every ``ssh`` of ours gets, whatever the user's ssh_config says, and which of them this ssh knows.

Our ssh is a child that holds one connection, in the foreground, for as long as we want. The user's files are meant for
ssh in a terminal: their options for that would fork a process that outlives us, ask questions, forward or print.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gpumesh.config.ssh.option_roles import OptionRole, list_options
from gpumesh.tunnels.local_system.local_command import local_command, read_at_most

_MAX_OUTPUT_BYTES = 256 * 1024
_TIMEOUT_S = 5.0  # for ``ssh -G``, which takes some milliseconds

FIXED_OPTIONS: Mapping[str, str] = {
    # The process: it stays in the foreground, and reads our pipe. A forked one would be nobody's child.
    "ForkAfterAuthentication": "no",
    "StdinNull": "no",
    "SessionType": "default",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "EscapeChar": "none",
    "PermitLocalCommand": "no",
    # Sharing and forwarding: only what we ask for.
    "ControlPersist": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "GSSAPIDelegateCredentials": "no",
    "Tunnel": "no",
    # Nothing of the user's changes: neither known_hosts nor the agent.
    "UpdateHostKeys": "no",
    "AddKeysToAgent": "no",
    # Every host has to show a known key, also this machine.
    "NoHostAuthenticationForLocalhost": "no",
    # How long: the supervisor tries again, and no channel ends because a model thinks for long.
    "ConnectionAttempts": "1",
    "NumberOfPasswordPrompts": "1",
    "TCPKeepAlive": "yes",
    "ChannelTimeout": "none",
    # What ssh prints is read by ssh_output.py.
    "LogLevel": "INFO",
    "LogVerbose": "none",
    "VisualHostKey": "no",
    "WarnWeakCrypto": "no",
}


async def read_unknown_options() -> frozenset[str]:
    """Returns the fixed options, in lower case, that the installed ssh does not know: it would not start with them.

    If ssh cannot be asked, returns no options: the error comes when ssh is started.
    """
    try:
        async with local_command(["ssh", "-G", "-F", "none", "--", "gpumesh"], stderr=False) as process:
            async with asyncio.timeout(_TIMEOUT_S):
                output, _truncated = await read_at_most(process.stdout, _MAX_OUTPUT_BYTES)
    except (OSError, TimeoutError):
        return frozenset()
    return find_unknown_options(output.decode("utf-8", "replace"))


def find_unknown_options(output: str) -> frozenset[str]:
    """Like ``read_unknown_options``, from the output of ``ssh -G``. Pure."""
    known = {line.split(" ", 1)[0].lower() for line in output.splitlines()}
    if "hostname" not in known:  # not the output of ``ssh -G``
        return frozenset()
    # ssh prints no line for an option without a value. All ssh since 7.9 know these.
    always_known = {"controlpath", "remotecommand"}
    fixed = {name.lower() for name in list_options(OptionRole.FIXED)}
    return frozenset(fixed - known - always_known)
