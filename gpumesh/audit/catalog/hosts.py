"""The explanations of codes about the way to a node: connection, SSH login, host keys, tunnel, identity of the host."""

from __future__ import annotations

from gpumesh.audit.catalog.explanation import E, Explanation, W

EXPLANATIONS = (
    Explanation(
        "node-unreachable",
        E,
        "the host cannot be reached",
        "The connection to the host fails or was lost; the finding's message has the exact reason. It is retried "
        "until it works, and nothing is sent there meanwhile.",
        "Try it by hand with the ssh command that the hint names. Pods get a new port, often a new address, at each "
        "restart: look it up at your provider and change `ssh.host` and `ssh.port`, or set `address_from`.",
    ),
    Explanation(
        "host-unresolved",
        E,
        "the host's name is unknown",
        "DNS does not know the name in `ssh.host`, or this machine has no working DNS now.",
        "Check the spelling of `ssh.host`; try `getent hosts NAME`. A Host of ~/.ssh/config goes under `ssh.alias`.",
    ),
    Explanation(
        "connect-refused",
        E,
        "nothing listens on that port",
        "The host answered, and refused: no server listens on that port.",
        "Check the port. A pod's external SSH port changes whenever it resets. For a direct node: start the server.",
    ),
    Explanation(
        "connect-timeout",
        E,
        "no answer in time",
        "Neither an acceptance nor a refusal came: the host is off, a firewall drops the packets, or it accepts TCP "
        "and then says nothing.",
        "Check that the machine runs and that its firewall lets this address in; raise `ssh.connect_timeout` for a "
        "host that is slow by nature.",
    ),
    Explanation(
        "host-unreachable",
        E,
        "no way to the host",
        "This machine's network has no route to the address, or is down.",
        "Check the network here (VPN, Wi-Fi), then the address.",
    ),
    Explanation(
        "not-ssh",
        E,
        "what listens there is not SSH",
        "Something accepted the connection and did not speak SSH.",
        "Check `ssh.port`; port 80 or 443 is the web server's.",
    ),
    Explanation(
        "host-key-unknown",
        E,
        "the host's key is not known yet",
        "The host is not in known_hosts, and the policy is strict: the first contact is a person's to judge.",
        "Compare the fingerprint with your provider's, then `gpumesh trust NODE`. For throw-away pods set "
        "`ssh.host_key_policy: accept-new`.",
    ),
    Explanation(
        "host-key-changed",
        E,
        "the host's key has changed",
        "The host shows another key than the one on record. After a pod's reset that is normal; on a workstation it "
        "may be somebody in between. Nothing is sent until a person decides. If the key on record is from a version "
        "that did not tell meshes apart, it may also be that of a node of the same name in another mesh.yaml.",
        "If you know why it changed, `gpumesh trust NODE` shows both and records the new one. If not, do not.",
    ),
    Explanation(
        "host-key-revoked",
        E,
        "the host's key is revoked",
        "known_hosts marks this key `@revoked`: it must not be trusted.",
        "Give the host a new key, or remove the mark if it is wrong.",
    ),
    Explanation(
        "key-unreadable",
        E,
        "the identity file cannot be used",
        "It is missing, not readable, no private key, or its passphrase is wrong.",
        "Check `ssh.identity_file` and its rights (0600); name the variable with its passphrase in "
        "`ssh.passphrase_env`, or load the key into an agent.",
    ),
    Explanation(
        "secret-missing",
        E,
        "a variable with a secret is not set",
        "mesh.yaml names an environment variable for a password, passphrase or key, and it is empty or not there.",
        "Set the variable where gpumesh runs (`export NAME=…`); it never stands in mesh.yaml itself.",
    ),
    Explanation(
        "auth-refused",
        E,
        "the host accepts none of our credentials",
        "The host was reached and its key is right, but it refused every key or password that was offered.",
        "Check `ssh.user` and `ssh.identity_file`; put the public key into the host's ~/.ssh/authorized_keys "
        "(`ssh-copy-id`).",
    ),
    Explanation(
        "forwarding-forbidden",
        E,
        "the host forbids forwarding",
        "Login works, but sshd refuses to forward to the server's port (AllowTcpForwarding no, or PermitOpen).",
        "Allow it in the host's sshd_config, or at RunPod use *SSH over exposed TCP* rather than ssh.runpod.io.",
    ),
    Explanation(
        "reverse-forward-refused",
        E,
        "the host opens no port of its own for us",
        "A pool's head reaches a worker through a port on the loopback of its host that leads to this machine. sshd "
        "does not open it: another program has the port, reverse forwarding is forbidden (AllowTcpForwarding no or "
        "local, PermitListen), or it would be open to the host's network (GatewayPorts yes).",
        "Allow it in the host's sshd_config: AllowTcpForwarding yes (or remote), GatewayPorts no.",
    ),
    Explanation(
        "transport-unsupported",
        E,
        "this host needs another transport",
        "It cannot be reached with this transport or by this form of address (a proxy that only gives terminals, an "
        "ssh_config with options that only OpenSSH knows).",
        "Set `ssh.transport: openssh`, or use the address that the hint names.",
    ),
    Explanation(
        "tunnel-lost",
        W,
        "the tunnel went down",
        "It was up, and the connection was reset or the host stopped answering. It reconnects by itself; the local "
        "port stays the same.",
        "Nothing, if it comes back. If it happens often, look at the network or at the host's sshd log.",
    ),
    Explanation(
        "session-ended",
        W,
        "the host ended our session",
        "Transport openssh holds its connection with a session in which it runs `cat`. The account's login shell, or a "
        "forced command, ended that session without running it, and ssh ended too. It reconnects at once, and from "
        "then on without such a session.",
        "Nothing: the tunnel works without the session. `ssh.transport: sshtunnel` needs none.",
    ),
    Explanation(
        "tunnel-down",
        W,
        "the tunnel is not up",
        "Something was asked of a node whose tunnel is down now.",
        "`gpumesh status` shows why it is down and when it is tried again.",
    ),
    Explanation(
        "tunnel",
        E,
        "the tunnel failed",
        "The tunnel failed for a reason that has no code of its own; see the message.",
        "Try the same host with `ssh -v`; with `-v` gpumesh's log says more.",
    ),
    Explanation(
        "tunnel-duplicate",
        W,
        "two nodes are one and the same",
        "Two nodes of mesh.yaml have the same address, user and server: one of them adds nothing.",
        "Delete one of them from mesh.yaml.",
    ),
    Explanation(
        "hostname-differs",
        W,
        "another host answers",
        "The host calls itself otherwise than `expect.hostname` says. A container gets a new name at each start; an "
        "address that was given to somebody else gives another host.",
        "If it is the right machine, change `expect.hostname`; if not, correct its address.",
    ),
    Explanation(
        "same-gpu",
        W,
        "two nodes, one GPU",
        "Several nodes reach the same GPU: they are routes to one machine, not machines. The GPU counts once in every "
        "total, and the balancer treats the nodes as one, so that they do not pile up on it.",
        "Keep one node and delete the others, or put their routes under its `backend.urls`.",
    ),
)
