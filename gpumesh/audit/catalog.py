"""What each code means and what to do about it: ``gpumesh explain CODE``, for findings and for errors alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpumesh.state import Severity

E, W, I = Severity.ERROR, Severity.WARNING, Severity.INFO  # noqa: E741  # a table is read by its columns


@dataclass(frozen=True, slots=True)
class Explanation:
    code: str
    severity: Severity
    title: str
    meaning: str
    remedy: str


_ROWS: tuple[tuple[str, Severity, str, str, str], ...] = (
    # -- reaching a node ---------------------------------------------------------------------------------------------
    (
        "node-unreachable",
        E,
        "the host cannot be reached",
        "The connection to the host fails or was lost; the finding's message has the exact reason. It is retried "
        "until it works, and nothing is sent there meanwhile.",
        "Try it by hand with the ssh command that the hint names. Pods get a new port, often a new address, at each "
        "restart: look it up at your provider and change `ssh.host` and `ssh.port`, or set `address_from`.",
    ),
    (
        "host-unresolved",
        E,
        "the host's name is unknown",
        "DNS does not know the name in `ssh.host`, or this machine has no working DNS now.",
        "Check the spelling of `ssh.host`; try `getent hosts NAME`. A Host of ~/.ssh/config goes under `ssh.alias`.",
    ),
    (
        "connect-refused",
        E,
        "nothing listens on that port",
        "The host answered, and refused: no server listens on that port.",
        "Check the port. A pod's external SSH port changes whenever it resets. For a direct node: start the server.",
    ),
    (
        "connect-timeout",
        E,
        "no answer in time",
        "Neither an acceptance nor a refusal came: the host is off, a firewall drops the packets, or it accepts TCP "
        "and then says nothing.",
        "Check that the machine runs and that its firewall lets this address in; raise `ssh.connect_timeout` for a "
        "host that is slow by nature.",
    ),
    (
        "host-unreachable",
        E,
        "no way to the host",
        "This machine's network has no route to the address, or is down.",
        "Check the network here (VPN, Wi-Fi), then the address.",
    ),
    (
        "not-ssh",
        E,
        "what listens there is not SSH",
        "Something accepted the connection and did not speak SSH.",
        "Check `ssh.port`; port 80 or 443 is the web server's.",
    ),
    (
        "host-key-unknown",
        E,
        "the host's key is not known yet",
        "The host is not in known_hosts, and the policy is strict: the first contact is a person's to judge.",
        "Compare the fingerprint with your provider's, then `gpumesh trust NODE`. For throw-away pods set "
        "`ssh.host_key_policy: accept-new`.",
    ),
    (
        "host-key-changed",
        E,
        "the host's key has changed",
        "The host shows another key than the one on record. After a pod's reset that is normal; on a workstation it "
        "may be somebody in between. Nothing is sent until a person decides.",
        "If you know why it changed, `gpumesh trust NODE` shows both and records the new one. If not, do not.",
    ),
    (
        "host-key-revoked",
        E,
        "the host's key is revoked",
        "known_hosts marks this key `@revoked`: it must not be trusted.",
        "Give the host a new key, or remove the mark if it is wrong.",
    ),
    (
        "key-unreadable",
        E,
        "the identity file cannot be used",
        "It is missing, not readable, no private key, or its passphrase is wrong.",
        "Check `ssh.identity_file` and its rights (0600); name the variable with its passphrase in "
        "`ssh.passphrase_env`, or load the key into an agent.",
    ),
    (
        "secret-missing",
        E,
        "a variable with a secret is not set",
        "mesh.yaml names an environment variable for a password, passphrase or key, and it is empty or not there.",
        "Set the variable where gpumesh runs (`export NAME=…`); it never stands in mesh.yaml itself.",
    ),
    (
        "auth-refused",
        E,
        "the host accepts none of our credentials",
        "The host was reached and its key is right, but it refused every key or password that was offered.",
        "Check `ssh.user` and `ssh.identity_file`; put the public key into the host's ~/.ssh/authorized_keys "
        "(`ssh-copy-id`).",
    ),
    (
        "forwarding-forbidden",
        E,
        "the host forbids forwarding",
        "Login works, but sshd refuses to forward to the server's port (AllowTcpForwarding no, or PermitOpen).",
        "Allow it in the host's sshd_config, or at RunPod use *SSH over exposed TCP* rather than ssh.runpod.io.",
    ),
    (
        "transport-unsupported",
        E,
        "this host needs another transport",
        "It cannot be reached with this transport or by this form of address (a proxy that only gives terminals, an "
        "ssh_config with options that only OpenSSH knows).",
        "Set `ssh.transport: openssh`, or use the address that the hint names.",
    ),
    (
        "tunnel-lost",
        W,
        "the tunnel went down",
        "It was up, and the connection was reset or the host stopped answering. It reconnects by itself; the local "
        "port stays the same.",
        "Nothing, if it comes back. If it happens often, look at the network or at the host's sshd log.",
    ),
    (
        "tunnel-down",
        W,
        "the tunnel is not up",
        "Something was asked of a node whose tunnel is down now.",
        "`gpumesh status` shows why it is down and when it is tried again.",
    ),
    (
        "tunnel",
        E,
        "the tunnel failed",
        "The tunnel failed for a reason that has no code of its own; see the message.",
        "Try the same host with `ssh -v`; with `-v` gpumesh's log says more.",
    ),
    (
        "tunnel-duplicate",
        W,
        "two nodes are one and the same",
        "Two nodes of mesh.yaml have the same address, user and server: one of them adds nothing.",
        "Delete one of them from mesh.yaml.",
    ),
    # -- who it is ---------------------------------------------------------------------------------------------------
    (
        "hostname-differs",
        W,
        "another host answers",
        "The host calls itself otherwise than `expect.hostname` says. A container gets a new name at each start; an "
        "address that was given to somebody else gives another host.",
        "If it is the right machine, change `expect.hostname`; if not, correct its address.",
    ),
    (
        "same-gpu",
        W,
        "two nodes, one GPU",
        "Several nodes reach the same GPU: they are routes to one machine, not machines. The GPU counts once in every "
        "total, and the balancer treats the nodes as one, so that they do not pile up on it.",
        "Keep one node and delete the others, or put their routes under its `backend.urls`.",
    ),
    # -- GPUs --------------------------------------------------------------------------------------------------------
    (
        "gpu-missing",
        E,
        "no GPU is there",
        "A GPU was expected, or a driver is installed, and none is found.",
        "Check `lspci | grep -i nvidia` on the host. A container needs `--gpus all`; a pod may have been restarted "
        "without its GPU.",
    ),
    (
        "gpu-differs",
        W,
        "another GPU than expected",
        "nvidia-smi shows another model than `expect.gpu`.",
        "Check that this is the right machine; if it is, change `expect.gpu`.",
    ),
    (
        "gpu-count",
        E,
        "another number of GPUs",
        "nvidia-smi shows fewer or more GPUs than `expect.gpus`.",
        "Look for `NVRM: Xid` in the host's dmesg (one fell off the bus) and at the container's `--gpus`; or change "
        "`expect.gpus`.",
    ),
    (
        "vram-differs",
        W,
        "another amount of GPU memory",
        "A GPU's memory is more than 2 % off `expect.vram_mib`: a slice of a card (MIG, vGPU) or another model.",
        "Check what your provider sold you; if it is meant so, change `expect.vram_mib`.",
    ),
    (
        "driver-differs",
        I,
        "another driver version",
        "The NVIDIA driver's version is not `expect.driver`.",
        "If the update was meant, change `expect.driver`.",
    ),
    (
        "driver-broken",
        E,
        "the NVIDIA driver does not answer",
        "nvidia-smi is there, but cannot speak with the driver. Models then run on the CPU, if at all.",
        "Run `nvidia-smi` on the host. After a kernel update the module must be built again (`dkms autoinstall`, or "
        "reinstall the driver); `modprobe nvidia` loads it.",
    ),
    (
        "driver-mismatch",
        E,
        "driver and library are of different versions",
        "The driver was updated while its old kernel module is still loaded: NVML refuses.",
        "Reboot the host, or stop what uses the GPU and `rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia`, then "
        "`modprobe nvidia`.",
    ),
    (
        "driver-hung",
        E,
        "nvidia-smi does not answer",
        "nvidia-smi was started and gave no answer in time: the driver hangs, or wakes a sleeping GPU very slowly.",
        "Look at the host's `dmesg | grep -i -e nvrm -e xid`; a hung driver needs a reboot. `nvidia-smi -pm 1` keeps "
        "the driver awake.",
    ),
    (
        "gpu-lost",
        E,
        "a GPU fell off the bus",
        "One GPU no longer answers on the PCI bus. Others on the same host are still shown.",
        "Reboot the host. If it comes back lost: power cable, seat, riser, heat; at a provider, ask for another.",
    ),
    (
        "gpu-cgroup-lost",
        E,
        "the container lost its GPU",
        "NVML says Unknown Error inside a container: its access to the device was taken away, mostly by a "
        "`systemctl daemon-reload` on its host.",
        "Restart the container. To prevent it, give the devices explicitly (`--device /dev/nvidia0 …`) or use CDI.",
    ),
    (
        "gpu-faulty",
        E,
        "a GPU reads errors",
        "nvidia-smi answers ERR! or Unknown Error where figures should be.",
        "Look for `NVRM: Xid` in dmesg; reset the GPU (`nvidia-smi -r`) or reboot; have it looked at if it returns.",
    ),
    (
        "gpu-throttled",
        W,
        "a GPU is slowed down",
        "The GPU lowers its clocks because of heat or its power supply.",
        "Check fans, air and power cable; a lower limit (`nvidia-smi -pl`) costs little speed and much heat.",
    ),
    (
        "gpu-inforom",
        W,
        "a GPU's infoROM is corrupted",
        "The GPU works, and its figures are good; part of its own records is damaged.",
        "Nothing urgent. Have the card looked at when it can be spared.",
    ),
    (
        "gpu-unreadable",
        E,
        "nvidia-smi says something else",
        "nvidia-smi ended well, but what it said is no table.",
        "Run `nvidia-smi` on the host, and see whether it is a wrapper script, or a shell that greets every command.",
    ),
    (
        "gpu-unknown",
        I,
        "the GPUs cannot be asked for",
        "There is no way to run nvidia-smi there: the node has no SSH, or the host gives no session. Requests are "
        "served all the same.",
        "Give the node an `ssh:` section, if its GPU should be seen.",
    ),
    (
        "nvidia-smi-missing",
        W,
        "nvidia-smi is not there",
        "The host has no nvidia-smi on any usual path.",
        "Install the driver's utilities, or use an image that has them. A host without an NVIDIA GPU works without.",
    ),
    (
        "nvidia-smi-old",
        W,
        "nvidia-smi is too old",
        "It knows not even the fields that drivers have had since 2015.",
        "Update the NVIDIA driver.",
    ),
    (
        "persistence-off",
        I,
        "persistence mode is off",
        "When nothing uses the GPU, the driver unloads; the next call, nvidia-smi's too, then takes seconds.",
        "`nvidia-smi -pm 1` on the host, or enable the nvidia-persistenced service.",
    ),
    # -- the server --------------------------------------------------------------------------------------------------
    (
        "backend-down",
        E,
        "the inference server does not serve",
        "The host is reached, but its server refuses, is silent, is still loading, or says an error.",
        "Start or restart it on the host (`systemctl restart ollama`, `docker start …`), and check `backend.port`.",
    ),
    (
        "wrong-server",
        E,
        "another kind of server answers",
        "The port answers, but not as this kind of server: a web page, another API, or no HTTP at all.",
        "Point `backend.port` or `backend.url` at the server itself, or set `backend.kind: openai` for llama-server, "
        "vLLM and LM Studio.",
    ),
    (
        "wrong-scheme",
        E,
        "plain HTTP and HTTPS are mixed up",
        "The port speaks HTTPS and is asked with plain HTTP, or the other way round.",
        "Write `backend.url` with the other one of http:// and https://; `backend.port` alone means http.",
    ),
    (
        "tls-refused",
        E,
        "no trusted TLS connection",
        "The server's certificate is not accepted (self-signed, expired, for another name), or no TLS connection "
        "comes about at all.",
        "Use http:// where SSH encrypts the way anyhow; else give the server a certificate of a known authority for "
        "the name in `backend.url`. `openssl s_client -connect HOST:PORT` shows what it offers.",
    ),
    (
        "redirected",
        E,
        "the server sends us elsewhere",
        "It answers with a redirect, to a login page, another host or HTTPS. Redirects are not followed: prompts go "
        "only where mesh.yaml says.",
        "Point `backend.port` or `backend.url` at the inference server itself, or write https:// if that is all it "
        "wants.",
    ),
    (
        "answer-broken",
        E,
        "the server's answer is not whole",
        "The list of models breaks off, or is no whole JSON: the server crashes while it answers, or a proxy on the "
        "way cuts long answers.",
        "See the server's log on its host (`journalctl -u ollama`, `docker logs`) and restart it; go around a proxy.",
    ),
    (
        "models-too-many",
        E,
        "the server lists too many models",
        "Its list has more than 4,000 models or is longer than 8 MiB. It is asked every two seconds, and nobody waits "
        "for that.",
        "Remove what nobody uses (`ollama rm`, `gpumesh models rm`), or let a server of its own offer what you need.",
    ),
    (
        "model-unusable",
        W,
        "the server lists models that cannot be asked for",
        "Some entries of its list of models have no name, one that is no text, one of more than 200 characters, or one "
        "with control characters. They are left out; what else the server lists is used.",
        "See on the host what lists them (`curl -s http://127.0.0.1:PORT/api/tags`, or `/v1/models`), and give the "
        "models plain names (`ollama cp`, `--alias`, `--served-model-name`).",
    ),
    (
        "host-refused",
        E,
        "Ollama refuses our Host header",
        "Ollama on loopback answers 403, without a word, to a name that is not its own.",
        "Name the server as its own host does (`http://127.0.0.1:PORT`), or set OLLAMA_HOST=0.0.0.0 there.",
    ),
    (
        "key-refused",
        E,
        "the server wants a key",
        "The inference server answers 401 or 403.",
        "Set `backend.api_key_env` to the variable that holds its key, and check the key.",
    ),
    (
        "backend-on-cpu",
        W,
        "a model runs on the CPU",
        "Part of a loaded model, or all of it, is not in the GPU's memory: it answers many times slower.",
        "Choose a smaller model, quantisation or context, or unload others. If all of it is on the CPU although "
        "the GPU is free, restart the server: it has lost the GPU.",
    ),
    (
        "redis-away",
        W,
        "other gateways are not heard",
        "mesh.yaml names a Redis over which several gateways tell each other what they have in flight, and it does not "
        "answer. This one goes on alone; two of them may now pile onto one GPU.",
        "Check that `redis.url` is right and that Redis runs and answers (`redis-cli -u URL ping`). With a single "
        "gateway, take `redis` out of mesh.yaml.",
    ),
    (
        "version-old",
        W,
        "the server is too old",
        "This version lacks what gpumesh relies on (`think` came with 0.9).",
        "Update Ollama on the host.",
    ),
    (
        "model-missing",
        W,
        "a model is not there",
        "A model that is expected, or was asked for, is on no node that is up, or not on this one.",
        "`ollama pull MODEL` on the host; `gpumesh models` shows which node has what.",
    ),
    (
        "model-differs",
        W,
        "one name, different models",
        "Nodes have different digests under one model's name: an answer depends on the node that gives it.",
        "`ollama pull MODEL` again on each of them.",
    ),
    (
        "disk-full",
        W,
        "no room for models",
        "Where the host keeps its models next to nothing is free: a pull ends with `no space left on device`.",
        "`gpumesh models` shows what is there, `gpumesh models rm MODEL` makes room; or point OLLAMA_MODELS at a "
        "larger disk.",
    ),
    # -- the ways to the server --------------------------------------------------------------------------------------
    (
        "route-dead",
        I,
        "a candidate does not serve",
        "Of a node's candidates (`backend.urls`) the first that answers is used; another one does not answer.",
        "Nothing, if it is meant as a spare. If it never will answer, delete it.",
    ),
    (
        "route-slower",
        I,
        "there is a faster way",
        "Another way to the same server answers clearly faster than the one in use.",
        "Put the faster one first under `backend.urls`. A way without SSH is for networks that you trust.",
    ),
    (
        "routes-differ",
        W,
        "candidates are different servers",
        "A node's candidates lead to servers with different models: which one answers depends on which one is up.",
        "Make a node of each of them; then both are used.",
    ),
    (
        "backend-exposed",
        W,
        "anybody can use the server",
        "The inference server answers on the host's public address, without SSH and without a key.",
        "Let it listen on loopback only (OLLAMA_HOST=127.0.0.1), or close its port in the firewall; the tunnel does "
        "not need it.",
    ),
    # -- what `gpumesh config check` foresees --------------------------------------------------------------------------
    (
        "plain-http",
        W,
        "the gateway is open to a network",
        "The gateway listens beyond this machine, and speaks HTTP without encryption: prompts and the key can be read "
        "on the way.",
        "Keep it to a network that you trust, or put a proxy with TLS before it; `gateway.listen: 127.0.0.1:11430` "
        "keeps it to this machine.",
    ),
    (
        "alias-unreadable",
        E,
        "the file ~/.ssh/config cannot be read",
        "`ssh.alias` names a Host of ~/.ssh/config, and ssh itself cannot make sense of that file.",
        "`ssh -G ALIAS` shows what is wrong with it.",
    ),
    (
        "alias-unknown",
        W,
        "nothing is configured for this alias",
        "`ssh.alias` names a Host that ~/.ssh/config does not have: it is taken for the host's name.",
        "Check its spelling, or add a `Host` block for it.",
    ),
    (
        "alias-needs-openssh",
        W,
        "the alias uses what only OpenSSH knows",
        "The Host of ~/.ssh/config has options (ProxyCommand and the like) that transport sshtunnel does not know.",
        "Write `transport: openssh` under the node's `ssh`.",
    ),
    (
        "no-credentials",
        W,
        "there is nothing to log in with",
        "Neither a key file nor an SSH agent nor a password is at hand for this node.",
        "Give `ssh.identity_file` or `ssh.password_env`, or start an agent and `ssh-add` a key.",
    ),
    (
        "key-open",
        W,
        "others can read the private key",
        "The key file can be read by other users of this machine; ssh refuses such keys.",
        "`chmod 600` the file.",
    ),
    (
        "address-from",
        E,
        "the program that tells the address is not there",
        "`address_from.command` names a program that cannot be found or run.",
        "Give its whole path, and make it executable.",
    ),
    (
        "config-edit",
        E,
        "this cannot be written into mesh.yaml",
        "The value stands in a way that cannot be changed without touching more: behind an alias, in a block of text.",
        "Change it by hand; the message says where it stands and what it should be.",
    ),
    # -- errors of requests and commands -----------------------------------------------------------------------------
    (
        "no-node",
        E,
        "no node can serve this",
        "Every node is down, draining, has failed the request, or lacks the model.",
        "`gpumesh status` shows each node and its reason.",
    ),
    (
        "deadline",
        E,
        "the deadline passed",
        "The request's overall deadline (`gateway.timeout`, X-GPUMesh-Timeout) passed.",
        "Give it more time, or look in `gpumesh status` at what keeps the nodes busy.",
    ),
    (
        "queue-full",
        W,
        "the queue is full",
        "More requests wait than `gateway.max_queue` allows, or their bodies take more memory than "
        "`gateway.body_memory_mib` allows: 503 with Retry-After.",
        "Try again after the time that the answer names; add nodes, or send batch work with priority `batch`.",
    ),
    (
        "already-running",
        E,
        "this mesh runs already",
        "A background mesh runs for this file.",
        "Use it (`gpumesh status`), or end it with `gpumesh down`.",
    ),
    ("not-running", E, "no mesh runs", "No background mesh runs for this file.", "`gpumesh up -d` starts one."),
    (
        "exec",
        E,
        "a command could not be run on the host",
        "The host gave no session, or the command did not end.",
        "Try it by hand with ssh; a proxy like ssh.runpod.io runs no commands.",
    ),
    (
        "probe",
        E,
        "an answer could not be read",
        "nvidia-smi or the server answered with something unexpected.",
        "The finding's own code says more; see `gpumesh audit`.",
    ),
    (
        "backend",
        E,
        "an attempt failed",
        "One attempt on one node failed; another node is tried where that is safe.",
        "`gpumesh status` shows the node's state.",
    ),
    (
        "backend-unreachable",
        E,
        "the server gave no answer",
        "Refused, reset or timed out before the answer began.",
        "Another node is tried by itself. If it stays so, look at the node's findings in `gpumesh audit`.",
    ),
    (
        "backend-status",
        E,
        "the server answered with an error",
        "The message has the server's own words.",
        "Act on the server's words; a 4xx is about the request, a 5xx about the server.",
    ),
    (
        "stream-cut",
        E,
        "an answer stopped short",
        "The stream ended before its final frame, and could not be continued elsewhere (tools, `format`, thinking, a "
        "repeating tail, or X-GPUMesh-Resume: off).",
        "Send the request again; the part that came is incomplete.",
    ),
    (
        "bad-request",
        E,
        "the request is wrong",
        "The client's request cannot be understood; the message says why.",
        "Correct the request.",
    ),
    (
        "usage",
        E,
        "the command line is wrong",
        "An option or argument is missing, unknown or contradicts another.",
        "`gpumesh COMMAND --help` shows what there is.",
    ),
    (
        "config",
        E,
        "mesh.yaml is wrong",
        "All of its problems are listed, each with file:line and the key's path.",
        "Correct them, and `gpumesh config check`; `gpumesh config schema` gives your editor completion.",
    ),
    (
        "failed",
        E,
        "the operation failed",
        "See the message; this failure has no code of its own.",
        "Run it again with `-v`; the log (`gpumesh logs`) says more.",
    ),
)

CATALOG: Mapping[str, Explanation] = {row[0]: Explanation(*row) for row in _ROWS}


def explain(code: str) -> Explanation | None:
    """Codes are written in lower case with dashes; case, blanks and underscores are forgiven."""
    return CATALOG.get(code.strip().lower().replace("_", "-").replace(" ", "-"))
