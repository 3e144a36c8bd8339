"""The meaning of every code. A test holds that each error's and each finding's code is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """``means``: what was seen and what usually causes it; its first sentence stands alone. ``do``: the next step."""

    means: str
    do: str


EXPLANATIONS: Mapping[str, Explanation] = {
    # -- findings about nodes and routes
    "node-unreachable": Explanation(
        "The node cannot be reached: no tunnel to it is up. The node's reason says at which step it fails.",
        "follow the node's own reason in `gpumesh status`; for a rented pod, see whether it still runs and has the same"
        " address.",
    ),
    "hostname-differs": Explanation(
        "The host calls itself something else than mesh.yaml expects. Either the pod was replaced by another one, or"
        " the address now belongs to another machine.",
        "check that it is the machine you mean; if so, set expect.hostname to the new name.",
    ),
    "same-gpu": Explanation(
        "Two nodes are two ways to one GPU: their GPUs have the same UUID. It is counted once in every total, and the"
        " two are balanced as one.",
        "keep the faster route and remove the other node from mesh.yaml, unless you want it as a spare way.",
    ),
    "same-store": Explanation(
        "Two nodes answer from one model store: the times at which their models were stored agree to the nanosecond."
        " They are most likely one server reached in two ways.",
        "keep the faster route and remove the other node.",
    ),
    "tunnel-duplicate": Explanation(
        "Two nodes have tunnels to one address of one host. The second carries nothing that the first could not.",
        "remove one of the two nodes from mesh.yaml.",
    ),
    # -- findings about GPUs
    "gpu-missing": Explanation(
        "mesh.yaml expects a GPU that nvidia-smi does not list. It was not rented, fell off the bus, or this is another"
        " host.",
        "run `gpumesh exec NODE -- nvidia-smi`; reboot the host if a GPU was lost, or correct expect.gpus.",
    ),
    "gpu-differs": Explanation(
        "The host has another model of GPU than mesh.yaml expects.",
        "ask the provider if you pay for another; else correct expect.gpu.",
    ),
    "gpu-count": Explanation(
        "The host has another number of GPUs than mesh.yaml expects.",
        "see `gpumesh exec NODE -- nvidia-smi -L`, then correct expect.gpus or ask the provider.",
    ),
    "gpu-lost": Explanation(
        "A GPU has fallen off the bus: the driver knows of it and cannot talk to it any more. Heat, power or a fault of"
        " the card cause it.",
        "reboot the host; if it comes back, look at `dmesg` for Xid errors.",
    ),
    "vram-differs": Explanation(
        "The GPU has another amount of memory than mesh.yaml expects. MIG partitions and other variants of a card look"
        " like that.",
        "correct expect.vram_mib, or ask the provider.",
    ),
    "driver-differs": Explanation(
        "The host's NVIDIA driver is another version than mesh.yaml expects.",
        "correct expect.driver, or update the host.",
    ),
    "driver-broken": Explanation(
        "nvidia-smi is there and fails: the driver is not loaded, was updated without a restart, or the container lost"
        " its GPU.",
        "the node's message says which: reload the driver or reboot the host, or restart the container.",
    ),
    "driver-missing": Explanation(
        "The host has no nvidia-smi, so its GPUs cannot be watched. Serving may work all the same.",
        "install the NVIDIA driver, or put nvidia-smi on the PATH of non-interactive shells.",
    ),
    "no-gpu": Explanation(
        "nvidia-smi works and finds no GPU.",
        "check that the container was started with its GPUs (docker run --gpus all), or rent one that has any.",
    ),
    "gpu-unknown": Explanation(
        "nvidia-smi did not answer in time, or not in a form that can be read, so nothing is known about the GPUs.",
        "run `gpumesh exec NODE -- nvidia-smi` and look; a cold driver without persistence mode can take seconds.",
    ),
    "persistence-off": Explanation(
        "Persistence mode is off: when nothing uses the GPU its driver is unloaded, and the next call takes seconds.",
        "run `gpumesh exec NODE -- nvidia-smi -pm 1` (needs root there).",
    ),
    "inforom-corrupted": Explanation(
        "The GPU's infoROM is corrupted. The figures are good; the card says that its own records are not.",
        "nothing at once; tell the provider or the vendor.",
    ),
    "gpu-throttled": Explanation(
        "The GPU runs slower than it could, to keep within its temperature or power.",
        "see to its cooling or its power limit (`gpumesh exec NODE -- nvidia-smi -q -d PERFORMANCE`).",
    ),
    # -- findings about servers
    "backend-down": Explanation(
        "The host is reached and its inference server does not answer.",
        "start it there (`ollama serve`), or correct backend.port in mesh.yaml.",
    ),
    "backend-on-cpu": Explanation(
        "A model runs on the CPU, all or in part, because the GPU's memory is too small for it or is not used. It is"
        " many times slower.",
        "free GPU memory (`gpumesh models unload`), use a smaller quantisation or context, or see why the server finds"
        " no GPU.",
    ),
    "backend-old": Explanation(
        "The server's version is older than what gpumesh is made for; some of what it needs may be missing.",
        "update the inference server on that host.",
    ),
    "model-missing": Explanation(
        "A model that is expected or asked for is on no node that is up.",
        "`gpumesh models pull MODEL --node NODE` fetches it; `gpumesh models` shows who has what.",
    ),
    "model-differs": Explanation(
        "Nodes have different things under one model's name: their digests differ. Answers depend on the node.",
        "`gpumesh models pull MODEL --all` brings them to the same version.",
    ),
    "wrong-server": Explanation(
        "Something answers on the backend's port, but not as the kind of server that mesh.yaml names.",
        "correct backend.port or backend.kind; `gpumesh exec NODE -- curl -s localhost:PORT` shows what is there.",
    ),
    # -- errors of tunnels
    "tunnel": Explanation("The tunnel failed for a reason of its own, which its message says.", "see the message."),
    "host-unresolved": Explanation(
        "DNS does not know the host's name.", "check ssh.host for a misspelling, and that this machine is online."
    ),
    "connect-refused": Explanation(
        "Nothing listens on the SSH port: the host is up and its sshd is not, or the port has changed.",
        "see at the provider whether the pod runs and which port it has now.",
    ),
    "connect-timeout": Explanation(
        "The host does not answer at all: it is off, or a firewall drops the packets.",
        "check the address, and whether the host runs.",
    ),
    "host-unreachable": Explanation("There is no network route to the host.", "check this machine's network or VPN."),
    "not-ssh": Explanation(
        "Something listens on the port and does not speak SSH.", "check ssh.port: it is another service's."
    ),
    "host-key-unknown": Explanation(
        "The host's key is not in known_hosts, so nobody has vouched for this host yet.",
        "compare the fingerprint, then `gpumesh trust NODE`; or set host_key_policy: accept-new for pods that come and"
        " go.",
    ),
    "host-key-changed": Explanation(
        "The host shows another key than the one on record. That is so after a pod was reset; on a machine of your own"
        " somebody may be in between.",
        "if you know why it changed: `gpumesh trust NODE`; if not, ask before you connect.",
    ),
    "host-key-revoked": Explanation(
        "The host's key is marked @revoked in known_hosts: somebody decided that it must not be trusted.",
        "ask whoever marked it; the host needs a new key.",
    ),
    "key-unreadable": Explanation(
        "The identity file is missing, cannot be read, is not a private key, or its passphrase is wrong.",
        "check ssh.identity_file and the variable that passphrase_env names.",
    ),
    "secret-missing": Explanation(
        "A variable that mesh.yaml names for a secret is not set in this environment.",
        "export it before `gpumesh up`; a background mesh has the environment that it was started in.",
    ),
    "auth-refused": Explanation(
        "The host accepts none of the keys, and no password, that it was offered.",
        "check ssh.user and ssh.identity_file; put the public key into the host's ~/.ssh/authorized_keys, or register"
        " it at the provider.",
    ),
    "forwarding-forbidden": Explanation(
        "The login works, but the host's sshd does not forward ports (AllowTcpForwarding no, or PermitOpen).",
        "allow it in the host's sshd_config; at RunPod use the direct TCP form of the address, not ssh.runpod.io.",
    ),
    "transport-unsupported": Explanation(
        "This host needs another SSH transport, or another form of address.",
        "set ssh.transport: openssh for it, or see the message.",
    ),
    "tunnel-lost": Explanation(
        "The tunnel was up and broke: reset, or no answer to keepalives.",
        "nothing: it is opened again by itself; if it happens often, `gpumesh logs` shows when.",
    ),
    "tunnel-down": Explanation(
        "Something needed the tunnel while it was not up.", "see the node's reason in `gpumesh status`."
    ),
    # -- other errors
    "failed": Explanation("Something failed for a reason that the message says.", "see the message."),
    "usage": Explanation("The command line was wrong.", "see `gpumesh COMMAND --help`."),
    "config": Explanation(
        "mesh.yaml cannot be used; each problem is told with its line.", "correct them; `gpumesh config check` checks."
    ),
    "no-node": Explanation(
        "No node can serve the request now.", "`gpumesh status` shows each node and why it cannot serve."
    ),
    "deadline": Explanation(
        "The request's time was over before its answer was complete; waiting for a place counts.",
        "raise --timeout or gateway.timeout, or add a node.",
    ),
    "queue-full": Explanation(
        "More requests wait than the queue may hold.", "send fewer at once, raise gateway.max_queue, or add a node."
    ),
    "already-running": Explanation(
        "A mesh runs already for this mesh.yaml, or another program has the gateway's port.",
        "`gpumesh status` shows it, `gpumesh down` stops it; --listen chooses another port.",
    ),
    "not-running": Explanation("No mesh is running for this mesh.yaml.", "`gpumesh up -d` starts one."),
    "exec": Explanation(
        "A command could not be run on a host: it gives no session, or the command took too long.",
        "try it by hand with `gpumesh exec NODE -- …`; some providers' proxies allow no commands.",
    ),
    "probe": Explanation(
        "A host or server answered a probe with something that cannot be read.", "see the finding that came of it."
    ),
    "backend": Explanation("One attempt on one inference server failed.", "see the message; other nodes were tried."),
    "backend-unreachable": Explanation(
        "The inference server did not accept the request, or gave no answer.", "see `gpumesh status`."
    ),
    "backend-status": Explanation(
        "The inference server refused the request with an HTTP status; the message has its own words.",
        "see the message: mostly the model or the options are not what the server takes.",
    ),
    "stream-cut": Explanation(
        "An answer ended before its final frame, and could not be continued on another node.", "ask again."
    ),
}
