"""The explanations of codes about the inference server, its models, and the routes to it."""

from __future__ import annotations

from gpumesh.audit.catalog.explanation import E, Explanation, I, W

EXPLANATIONS = (
    Explanation(
        "backend-down",
        E,
        "the inference server does not serve",
        "The host is reached, but its server refuses, is silent, is still loading, or says an error.",
        "Start or restart it on the host (`systemctl restart ollama`, `docker start …`), and check `backend.port`.",
    ),
    Explanation(
        "wrong-server",
        E,
        "another kind of server answers",
        "The port answers, but not as this kind of server: a web page, another API, or no HTTP at all.",
        "Point `backend.port` or `backend.url` at the server itself. If it is an inference server, leave out "
        "`backend.kind`: which kind it is, is found by asking.",
    ),
    Explanation(
        "wrong-scheme",
        E,
        "plain HTTP and HTTPS are mixed up",
        "The port speaks HTTPS and is asked with plain HTTP, or the other way round.",
        "Write `backend.url` with the other one of http:// and https://; `backend.port` alone means http.",
    ),
    Explanation(
        "tls-refused",
        E,
        "no trusted TLS connection",
        "The server's certificate is not accepted (self-signed, expired, for another name), or no TLS connection "
        "comes about at all.",
        "Use http:// where SSH encrypts the way anyhow; else give the server a certificate of a known authority for "
        "the name in `backend.url`. `openssl s_client -connect HOST:PORT` shows what it offers.",
    ),
    Explanation(
        "redirected",
        E,
        "the server sends us elsewhere",
        "It answers with a redirect, to a login page, another host or HTTPS. Redirects are not followed: prompts go "
        "only where mesh.yaml says.",
        "Point `backend.port` or `backend.url` at the inference server itself, or write https:// if that is all it "
        "wants.",
    ),
    Explanation(
        "answer-broken",
        E,
        "the server's answer is not whole",
        "The list of models breaks off, or is no whole JSON: the server crashes while it answers, or a proxy on the "
        "way cuts long answers.",
        "See the server's log on its host (`journalctl -u ollama`, `docker logs`) and restart it; go around a proxy.",
    ),
    Explanation(
        "answer-foreign",
        W,
        "requests are answered by no inference server",
        "The last request got a redirect, a web page, an empty answer, or a status with which a proxy says that its "
        "server does not answer (502, 504, 520 to 530 …). The probes may be answered all the same. Requests go to "
        "other nodes. The finding ends with the next request that the node serves.",
        "See the log of the proxy or tunnel before the server (time-outs, limits, login), or point `backend.port` or "
        "`backend.url` at the server itself.",
    ),
    Explanation(
        "models-too-many",
        E,
        "the server lists too many models",
        "Its list has more than 4,000 models or is longer than 8 MiB. It is asked every two seconds, and nobody waits "
        "for that.",
        "Remove what nobody uses (`ollama rm`, `gpumesh models rm`), or let a server of its own offer what you need.",
    ),
    Explanation(
        "model-unusable",
        W,
        "the server lists models that cannot be asked for",
        "Some entries of its list of models have no name, one that is no text, one of more than 200 characters, or one "
        "with control characters. They are left out; what else the server lists is used.",
        "See on the host what lists them (`curl -s http://127.0.0.1:PORT/api/tags`, or `/v1/models`), and give the "
        "models plain names (`ollama cp`, `--alias`, `--served-model-name`).",
    ),
    Explanation(
        "host-refused",
        E,
        "Ollama refuses our Host header",
        "Ollama on loopback answers 403, without a word, to a name that is not its own.",
        "Name the server as its own host does (`http://127.0.0.1:PORT`), or set OLLAMA_HOST=0.0.0.0 there.",
    ),
    Explanation(
        "key-refused",
        E,
        "the server wants a key",
        "The inference server answers 401 or 403.",
        "Set `backend.api_key_env` to the variable that holds its key, and check the key.",
    ),
    Explanation(
        "backend-on-cpu",
        W,
        "a model runs on the CPU",
        "Part of a loaded model, or all of it, is not in the GPU's memory: it answers many times slower.",
        "Choose a smaller model, quantisation or context, or unload others. If all of it is on the CPU although "
        "the GPU is free, restart the server: it has lost the GPU.",
    ),
    Explanation(
        "node-slow",
        W,
        "a node has become slow",
        "Its first tokens come later than forecast, or its tokens more slowly, than this node's own past says, by a "
        "factor of two and more, while the other nodes are as fast as before. Its forecasts are multiplied by this "
        "factor, so it gets fewer requests, and every twentieth as a probe.",
        "See what slows it down on the host: a throttled or shared GPU (`nvidia-smi -q -d PERFORMANCE`), a model "
        "partly on the CPU (`ollama ps`), a server that swaps. It recovers by itself when its answers are fast again.",
    ),
    Explanation(
        "thrashing",
        W,
        "the node loads models instead of serving them",
        "In the last minutes the node has spent a fifth of its time or more on loads that requests through this mesh "
        "have caused, and has loaded the same model several times: models push each other out of its memory, or "
        "clients ask for one model with different contexts (`num_ctx`), and each change is a load.",
        "Two models: give each nodes of its own with `models.<name>.nodes` in mesh.yaml, or say with "
        "`models.<name>.copies` on how many nodes it stays (`pinned: true`: nothing pushes it out); where the memory "
        "is large enough for both, raise OLLAMA_MAX_LOADED_MODELS on the host. Two contexts: "
        "`models.<name>.context_steps` in mesh.yaml rounds them up to the same. `gpumesh status -v` shows the loads.",
    ),
    Explanation(
        "version-old",
        W,
        "the server is too old",
        "This version lacks what gpumesh relies on (`think` came with 0.9).",
        "Update Ollama on the host.",
    ),
    Explanation(
        "model-missing",
        W,
        "a model is not there",
        "A model that is expected, or was asked for, is on no node that is up, or not on this one.",
        "`ollama pull MODEL` on the host; `gpumesh models` shows which node has what.",
    ),
    Explanation(
        "model-listed-missing",
        W,
        "a listed model is not there",
        "The server lists the model, but answers 404 to requests for it: a part of it is missing, or somebody has just "
        "deleted it. No request for it goes to this node until the server's list changes; other models are served.",
        "`ollama pull MODEL` again on the host, or `ollama rm MODEL`. If several servers are behind one address, give "
        "each of them the model.",
    ),
    Explanation(
        "model-unloadable",
        W,
        "a model cannot be loaded",
        "The server fails when it loads the model, most often because the GPU's memory or the host's does not suffice. "
        "Requests for this model go to other nodes, and it is tried again after 5 s to 5 min; the node serves its "
        "other models.",
        "See what uses the memory (`ollama ps`, `nvidia-smi`), and free it; else choose a smaller model, quantisation "
        "or `num_ctx`, or remove the model from this node (`ollama rm MODEL`).",
    ),
    Explanation(
        "model-differs",
        W,
        "one name, different models",
        "Nodes have different digests under one model's name: an answer depends on the node that gives it.",
        "`ollama pull MODEL` again on each of them.",
    ),
    Explanation(
        "disk-full",
        W,
        "no room for models",
        "Where the host keeps its models next to nothing is free: a pull ends with `no space left on device`.",
        "`gpumesh models` shows what is there, `gpumesh models rm MODEL` makes room; or point OLLAMA_MODELS at a "
        "larger disk.",
    ),
    Explanation(
        "route-dead",
        I,
        "a candidate does not serve",
        "Of a node's candidates (`backend.urls`) the first that answers is used; another one does not answer.",
        "Nothing, if it is meant as a spare. If it never will answer, delete it.",
    ),
    Explanation(
        "route-slower",
        I,
        "there is a faster way",
        "Another way to the same server answers clearly faster than the one in use.",
        "Put the faster one first under `backend.urls`. A way without SSH is for networks that you trust.",
    ),
    Explanation(
        "routes-differ",
        W,
        "candidates are different servers",
        "A node's candidates lead to servers with different models: which one answers depends on which one is up.",
        "Make a node of each of them; then both are used.",
    ),
    Explanation(
        "backend-exposed",
        W,
        "anybody can use the server",
        "The inference server answers on the host's public address, without SSH and without a key.",
        "Let it listen on loopback only (OLLAMA_HOST=127.0.0.1), or close its port in the firewall; the tunnel does "
        "not need it.",
    ),
)
