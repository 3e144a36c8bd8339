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
        "failed",
        E,
        "the operation failed",
        "See the message; this failure has no code of its own.",
        "Run it again with `-v`; the log (`gpumesh logs`) says more.",
    ),
)
