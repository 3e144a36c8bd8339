"""The explanations of the codes of errors with which requests and commands end: no-node, deadline, queue-full, …"""

from __future__ import annotations

from gpumesh.audit.catalog.explanation import E, Explanation, W

EXPLANATIONS = (
    Explanation(
        "no-node",
        E,
        "no node can serve this",
        "Every node is down, draining, has failed the request, or lacks the model.",
        "`gpumesh status` shows each node and its reason.",
    ),
    Explanation(
        "servers-failed",
        E,
        "two servers failed at this request",
        "Two servers, or one server twice, answered 500 to the same request, or ended while they worked on it. The "
        "request itself may be the cause, so no other server gets it, and no fallback is tried.",
        "See the servers' logs. Before the mesh gets the request again, try it shorter, with another model, or on one "
        "node alone (`X-GPUMesh-Node`).",
    ),
    Explanation(
        "deadline",
        E,
        "the deadline passed",
        "The request's overall deadline (`gateway.timeout`, X-GPUMesh-Timeout) passed.",
        "Give it more time, or look in `gpumesh status` at what keeps the nodes busy.",
    ),
    Explanation(
        "queue-full",
        W,
        "the queue is full",
        "More requests wait than `gateway.max_queue` allows, or their bodies take more memory than "
        "`gateway.body_memory_mib` allows: 503 with Retry-After.",
        "Try again after the time that the answer names; add nodes, or send batch work with priority `batch`.",
    ),
    Explanation(
        "already-running",
        E,
        "this mesh runs already",
        "A background mesh runs for this file.",
        "Use it (`gpumesh status`), or end it with `gpumesh down`.",
    ),
    Explanation(
        "not-running", E, "no mesh runs", "No background mesh runs for this file.", "`gpumesh up -d` starts one."
    ),
    Explanation(
        "pool",
        E,
        "a pool cannot be used",
        "The message says what is wrong with the pool, and on which host.",
        "`gpumesh pool status` shows the pool and its members.",
    ),
    Explanation(
        "pool-failed",
        E,
        "a part of a pool has failed",
        "A worker or the head ended, the tunnel of a member was lost, or llama-server reports other devices or sizes "
        "than were planned. A pool with a part of its members is never used: all its parts were ended.",
        "It is started again by itself, each time after a longer wait. `gpumesh pool status` says what failed; "
        "`gpumesh pool up` tries it at once.",
    ),
    Explanation(
        "pool-member-away",
        E,
        "a member of a pool cannot be reached",
        "The tunnel to the head of the pool is down. The message has the tunnel's reason.",
        "The pool is started again as soon as the tunnel is up. `gpumesh status` shows what keeps it down.",
    ),
    Explanation(
        "pool-member-unusable",
        E,
        "a node cannot be a member of a pool",
        "The node is disabled, or is not in the running mesh, or it is another machine that is reached without SSH: "
        "then nothing can be started there.",
        "Give the node an `ssh:` section, enable it, or take it out of the pool's `nodes`.",
    ),
    Explanation(
        "pool-does-not-fit",
        E,
        "a pool does not fit",
        "The model, its context and the buffers for computing need more memory than the members offer. The message "
        "says by how much.",
        "`gpumesh pool plan` says which context, KV type or quantisation would fit. Or free memory: with "
        "`unload: true`, the pool asks Ollama to unload its models.",
    ),
    Explanation(
        "pool-program-missing",
        E,
        "llama.cpp is not on a host",
        "A worker of a pool needs `ggml-rpc-server`, its head `llama-server`. Neither is on the host's PATH nor in the "
        "usual places.",
        "Install llama.cpp there with its RPC backend (built with `-DGGML_RPC=ON`), or name its folder in "
        "`llama_cpp_dir`. gpumesh installs nothing by itself.",
    ),
    Explanation(
        "pool-versions-differ",
        E,
        "the hosts of a pool have different versions of llama.cpp",
        "The protocol between llama-server and ggml-rpc-server changes with the version, and is not checked by them: "
        "they would fail, or compute nonsense.",
        "Install the same build of llama.cpp on all hosts of the pool.",
    ),
    Explanation(
        "pool-model-missing",
        E,
        "the model of a pool is not there",
        "The head's host has no such file, or its Ollama has no such model, or the file is not a GGUF file that can be "
        "read.",
        "Check `model` of the pool. For a model of Ollama: `gpumesh models pull MODEL --node HEAD`.",
    ),
    Explanation(
        "pool-down",
        W,
        "a pool does not serve",
        "A pool that is wanted (`gpumesh pool up`, or `autostart: true`) has failed. The finding says why.",
        "Act on its hint. `gpumesh pool status` shows the pool; `gpumesh pool up` tries it at once, and "
        "`gpumesh pool down` ends it.",
    ),
    Explanation(
        "exec",
        E,
        "a command could not be run on the host",
        "The host gave no session, or the command did not end.",
        "Try it by hand with ssh; a proxy like ssh.runpod.io runs no commands.",
    ),
    Explanation(
        "probe",
        E,
        "an answer could not be read",
        "nvidia-smi or the server answered with something unexpected.",
        "The finding's own code says more; see `gpumesh audit`.",
    ),
    Explanation(
        "backend",
        E,
        "an attempt failed",
        "One attempt on one node failed; another node is tried where that is safe.",
        "`gpumesh status` shows the node's state.",
    ),
    Explanation(
        "backend-unreachable",
        E,
        "the server gave no answer",
        "Refused, reset or timed out before the answer began.",
        "Another node is tried by itself. If it stays so, look at the node's findings in `gpumesh audit`.",
    ),
    Explanation(
        "backend-status",
        E,
        "the server answered with an error",
        "The message has the server's own words.",
        "Act on the server's words; a 4xx is about the request, a 5xx about the server.",
    ),
    Explanation(
        "stream-cut",
        E,
        "an answer stopped short",
        "The stream ended before its final frame, and could not be continued elsewhere (tools, `format`, thinking, a "
        "repeating tail, or X-GPUMesh-Resume: off).",
        "Send the request again; the part that came is incomplete.",
    ),
    Explanation(
        "bad-request",
        E,
        "the request is wrong",
        "The client's request cannot be understood; the message says why.",
        "Correct the request.",
    ),
    Explanation(
        "usage",
        E,
        "the command line is wrong",
        "An option or argument is missing, unknown or contradicts another.",
        "`gpumesh COMMAND --help` shows what there is.",
    ),
    Explanation(
        "config",
        E,
        "mesh.yaml is wrong",
        "All of its problems are listed, each with file:line and the key's path.",
        "Correct them, and `gpumesh config check`; `gpumesh config schema` gives your editor completion.",
    ),
    Explanation(
        "notify",
        E,
        "a message could not be sent",
        "A receiver of `notify` in mesh.yaml did not take a message: the webhook is away or refused it, or the command "
        "failed. The mesh goes on.",
        "`gpumesh notify test` sends a message by each rule, and says what goes wrong.",
    ),
    Explanation(
        "batch",
        E,
        "a batch cannot be used",
        "The message says which batch, and what is wrong with it.",
        "`gpumesh batch list` shows all batches.",
    ),
    Explanation(
        "batch-not-found",
        E,
        "no such batch or file",
        "The store of batches has no batch, or no file, with this id. Each mesh.yaml has a store of its own, and a "
        "batch is removed 30 days after its end.",
        "`gpumesh batch list` shows all batches of this mesh.yaml.",
    ),
    Explanation(
        "batch-conflict",
        E,
        "the batch's status does not allow this",
        "A batch can be cancelled until it has ended, and can be retried or removed after that. A file cannot be "
        "removed while a batch needs it.",
        "`gpumesh batch show ID` shows the status.",
    ),
    Explanation(
        "batch-owner",
        E,
        "this gateway does not have the key of the batch",
        "A batch was made with an API key that the mesh.yaml of this gateway does not have, so it is not known here "
        "what its requests may use. Another gateway of the same Redis works on it if it has a key of this name; else "
        "its requests fail when its window has passed.",
        "Add the key to `gateway.keys`, or leave the batch to the gateway on which it was made.",
    ),
    Explanation(
        "batch-store",
        E,
        "the store of batches cannot be used",
        "Batches are kept in a SQLite file of the state folder, or in Redis. The disk is full, the file is damaged or "
        "of a newer version of gpumesh, or Redis does not answer.",
        "The message names the file or the address. Nothing that was stored is lost; a running mesh goes on with its "
        "batches when the store is back.",
    ),
    Explanation(
        "failed",
        E,
        "the operation failed",
        "See the message; this failure has no code of its own.",
        "Run it again with `-v`; the log (`gpumesh logs`) says more.",
    ),
)
