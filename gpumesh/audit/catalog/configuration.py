"""The explanations of the codes of `gpumesh config check`, and of failures to write mesh.yaml."""

from __future__ import annotations

from gpumesh.audit.catalog.explanation import E, Explanation, I, W

EXPLANATIONS = (
    Explanation(
        "plain-http",
        W,
        "the gateway is open to a network",
        "The gateway listens beyond this machine, and speaks HTTP without encryption: prompts and the key can be read "
        "on the way.",
        "Keep it to a network that you trust, or put a proxy with TLS before it; `gateway.listen: 127.0.0.1:11430` "
        "keeps it to this machine.",
    ),
    Explanation(
        "alias-unreadable",
        E,
        "the file ~/.ssh/config cannot be read",
        "`ssh.alias` names a Host of ~/.ssh/config, and ssh itself cannot make sense of that file.",
        "`ssh -G ALIAS` shows what is wrong with it.",
    ),
    Explanation(
        "alias-unknown",
        W,
        "nothing is configured for this alias",
        "`ssh.alias` names a Host that ~/.ssh/config does not have: it is taken for the host's name.",
        "Check its spelling, or add a `Host` block for it.",
    ),
    Explanation(
        "pool-node-unusable",
        W,
        "a node of a pool can hold no layers",
        "A pool of mesh.yaml names a node that is disabled, or that has no GPU. A node without a GPU takes part with "
        "its CPU only where the pool says how much `memory` it may take there.",
        "Enable the node, leave it out of the pool, or write `{node: NAME, memory: 8GiB}` in the pool's `nodes`.",
    ),
    Explanation(
        "alias-needs-openssh",
        W,
        "the alias uses what only OpenSSH knows",
        "The Host of ~/.ssh/config has options (ProxyCommand and the like) that transport sshtunnel does not know.",
        "Write `transport: openssh` under the node's `ssh`.",
    ),
    Explanation(
        "no-credentials",
        W,
        "there is nothing to log in with",
        "Neither a key file nor an SSH agent nor a password is at hand for this node.",
        "Give `ssh.identity_file` or `ssh.password_env`, or start an agent and `ssh-add` a key.",
    ),
    Explanation(
        "key-open",
        W,
        "others can read the private key",
        "The key file can be read by other users of this machine; ssh refuses such keys.",
        "`chmod 600` the file.",
    ),
    Explanation(
        "address-from",
        E,
        "the program that tells the address is not there",
        "`address_from.command` names a program that cannot be found or run.",
        "Give its whole path, and make it executable.",
    ),
    Explanation(
        "config-changed",
        W,
        "mesh.yaml is not what runs",
        "mesh.yaml was changed after the running mesh had read it, so the mesh still has other nodes or settings than "
        "the file. It is only a remark if nothing but `expect` has changed.",
        "A mesh takes a change over by itself, a second or two after the file was saved. With `gateway: {reload: "
        "manual}` it waits for `gpumesh reload`. `gateway.listen` and `redis` need `gpumesh down` and `gpumesh up -d`.",
    ),
    Explanation(
        "config-invalid",
        W,
        "mesh.yaml has errors while its mesh runs",
        "The file was changed and cannot be used now, so the mesh runs on as the file was before. Nothing of it was "
        "taken over.",
        "`gpumesh config check` says all that is wrong. As soon as the file is right the mesh takes it over, or at "
        "`gpumesh reload` if the file said `reload: manual`. A variable that the file names must be set where the mesh "
        "was started: for another one, `gpumesh down` and `gpumesh up -d`.",
    ),
    Explanation(
        "mesh-killed",
        W,
        "the mesh was killed or has crashed",
        "The mesh that ran for this mesh.yaml ended without stopping: by `kill -9`, for want of memory, by a crash, or "
        "with its machine. Its tunnels have ended with it. The next mesh accounts in its log for what was in flight.",
        "`gpumesh up -d` starts it again. `gpumesh service install` makes it a service, which the system starts again "
        "by itself.",
    ),
    Explanation(
        "node-leaving",
        I,
        "a node has left the mesh, and its last requests still run",
        "It was removed from mesh.yaml, or has a new tunnel, while requests ran there. They end where they are.",
        "Nothing. A host that you give back: wait until this is gone.",
    ),
    Explanation(
        "config-edit",
        E,
        "this cannot be written into mesh.yaml",
        "The value stands in a way that cannot be changed without touching more: behind an alias, in a block of text.",
        "Change it by hand; the message says where it stands and what it should be.",
    ),
)
