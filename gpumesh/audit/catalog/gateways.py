"""The explanations of the codes about several gateways that share the nodes of a mesh (`redis` in mesh.yaml)."""

from __future__ import annotations

from gpumesh.audit.catalog.explanation import Explanation, I, W

EXPLANATIONS = (
    Explanation(
        "redis-away",
        W,
        "other gateways are not heard",
        "mesh.yaml names a Redis over which several gateways share the places on their nodes, and it does not answer "
        "in time, refuses what it is asked, or cannot be logged in to. This gateway goes on alone, as if there were no "
        "others: together they may now send a node more requests than it runs at once. It tries again every few "
        "seconds.",
        "`gpumesh doctor` says what Redis answers. Check that `redis.url` is right, that Redis runs, is no read-only "
        "replica and has memory left. With a single gateway, take `redis` out of mesh.yaml.",
    ),
    Explanation(
        "redis-slow",
        W,
        "answers of Redis take long",
        "Each of the last answers of Redis took 20 ms or more. A request on a node that several gateways use waits for "
        "one or two of them before it is sent, and a freed place stays free for so long. From 300 ms on this gateway "
        "would go on alone.",
        "Use a Redis in the network of the gateways, not one behind a slow line; look whether it is overloaded "
        "(`redis-cli --latency`, `SLOWLOG GET`).",
    ),
    Explanation(
        "redis-ca",
        W,
        "the certificates for Redis cannot be used",
        "`redis.ca_file` cannot be read, or is given for a URL without TLS, where it has no effect.",
        "Check the path. With TLS the URL begins with `rediss://` or `rediss+sentinel://`.",
    ),
    Explanation(
        "redis-plain",
        I,
        "traffic to Redis is not encrypted",
        "The URL of Redis names another machine, without TLS. Whoever reads along sees the password, the names of "
        "models and hosts, and the prompts of durable batches.",
        "Use `rediss://` and, if needed, `redis.ca_file`; or keep it to a network that you trust.",
    ),
    Explanation(
        "redis-name",
        W,
        "the mesh has no name of its own",
        "Gateways whose mesh.yaml has the same `name` share places and batches over one Redis. This mesh.yaml has "
        "none, so it shares them with any other mesh without a name.",
        "Give each mesh a `name` in mesh.yaml, and the same one to all gateways over the same nodes.",
    ),
)
