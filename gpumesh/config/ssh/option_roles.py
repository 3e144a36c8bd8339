"""Every option of ssh_config(5), up to OpenSSH 10, and its role for our connections.

A user's ``~/.ssh/config`` is written for ssh in a terminal. An option that nobody here has thought of can turn our ssh
into something else: a process in the background that outlives us, a session without a command, a second set of
forwards. So no option is left out: a test compares this table with what the installed ssh knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class OptionRole(StrEnum):
    """What becomes of an option that the user's files set for a host."""

    FIXED = "fixed"  # transport openssh sets a value of its own (tunnels/openssh/fixed_options.py)
    READ = "read"  # config/ssh reads it, so it holds in both transports
    SSH_ONLY = "ssh-only"  # only ssh can do it: an alias with it needs transport openssh
    FREE = "free"  # ssh may do as the option says; without it, transport sshtunnel reaches the same host as well


_FIXED = """
AddKeysToAgent BatchMode ChannelTimeout ClearAllForwardings ConnectTimeout ConnectionAttempts ControlMaster ControlPath
ControlPersist EscapeChar ExitOnForwardFailure ForkAfterAuthentication ForwardAgent ForwardX11
GSSAPIDelegateCredentials LogLevel LogVerbose NoHostAuthenticationForLocalhost NumberOfPasswordPrompts
PermitLocalCommand RemoteCommand RequestTTY ServerAliveCountMax ServerAliveInterval SessionType StdinNull
StreamLocalBindMask StreamLocalBindUnlink TCPKeepAlive Tunnel UpdateHostKeys VisualHostKey
WarnWeakCrypto
"""
_READ = "HostName IdentitiesOnly IdentityFile Port ProxyJump StrictHostKeyChecking User UserKnownHostsFile"
_SSH_ONLY = """
BindAddress BindInterface CertificateFile GlobalKnownHostsFile HostKeyAlias HostbasedAuthentication IdentityAgent
KnownHostsCommand PKCS11Provider PreferredAuthentications ProxyCommand PubkeyAuthentication RefuseConnection
RevokedHostKeys SecurityKeyProvider VerifyHostKeyDNS
"""
# Algorithms are here, too: many systems set them for all hosts. Where paramiko and the host have none in common, the
# error names transport openssh.
_FREE = """
AddressFamily CASignatureAlgorithms CanonicalDomains CanonicalizeFallbackLocal CanonicalizeHostname CanonicalizeMaxDots
CanonicalizePermittedCNAMEs CheckHostIP Ciphers Compression DynamicForward EnableEscapeCommandline EnableSSHKeysign
FingerprintHash ForwardX11Timeout ForwardX11Trusted GSSAPIAuthentication GSSAPIClientIdentity GSSAPIKeyExchange
GSSAPIKexAlgorithms GSSAPIRenewalForcesRekey GSSAPIServerIdentity GSSAPITrustDNS GatewayPorts HashKnownHosts Host
HostKeyAlgorithms HostbasedAcceptedAlgorithms IPQoS IgnoreUnknown Include KbdInteractiveAuthentication
KbdInteractiveDevices KexAlgorithms LocalCommand LocalForward MACs ObscureKeystrokeTiming PasswordAuthentication
PermitRemoteOpen ProxyUseFdpass PubkeyAcceptedAlgorithms RekeyLimit RemoteForward RequiredRSASize SendEnv SetEnv
SyslogFacility Tag TunnelDevice UseKeychain VersionAddendum XAuthLocation
"""


def _read_names(text: str, role: OptionRole) -> dict[str, tuple[str, OptionRole]]:
    return {name.lower(): (name, role) for name in text.split()}


# By the name in lower case, as ``ssh -G`` prints it: the name as in ssh_config(5), and the role.
_OPTIONS: Mapping[str, tuple[str, OptionRole]] = {
    **_read_names(_FIXED, OptionRole.FIXED),
    **_read_names(_READ, OptionRole.READ),
    **_read_names(_SSH_ONLY, OptionRole.SSH_ONLY),
    **_read_names(_FREE, OptionRole.FREE),
}


def find_role(option: str) -> OptionRole | None:
    """The role of an option, in any case of letters. ``None``: no option of this name is known here."""
    known = _OPTIONS.get(option.lower())
    return None if known is None else known[1]


def list_options(role: OptionRole) -> tuple[str, ...]:
    """The names of all options with this role, as in ssh_config(5), in alphabetical order."""
    return tuple(sorted(name for name, own_role in _OPTIONS.values() if own_role is role))


def find_ssh_only_name(option: str, value: str) -> str | None:
    """The option's name as in ssh_config(5), if only ssh supports it and this value uses it; otherwise ``None``."""
    known = _OPTIONS.get(option.lower())
    if known is None or known[1] is not OptionRole.SSH_ONLY:
        return None
    name = known[0]
    # The keys are what transport sshtunnel tries first, so only their absence needs ssh.
    unused_values = ("yes", "true", "unbound") if name == "PubkeyAuthentication" else ("none", "no", "false")
    return None if value.lower() in unused_values else name
