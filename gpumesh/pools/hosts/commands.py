"""The command lines of a pool's programs, from its plan. Pure.

Everything listens on the host's loopback only. Options by llama.cpp build 10434 (tools/server/README.md,
tools/rpc/rpc-server.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpumesh.errors import PoolFailed
from gpumesh.pools.base import DeviceShare, MemberPlan, PoolPlan
from gpumesh.pools.hosts.programs import HostPrograms
from gpumesh.pools.planning.speed import LONGEST_DRAFT

LOOPBACK = "127.0.0.1"
CACHE_FOLDER = "${XDG_CACHE_HOME:-$HOME/.cache}/gpumesh/llama.cpp"
# A worker's cache is not used if the disk would have less than this left.
CACHE_RESERVE_BYTES = 2 << 30

# Both scripts give the program the environment that it needs. A release has its libraries in the folder of the program
# ($1). CUDA numbers GPUs by their speed if it is not told to number them as nvidia-smi does. Variables such as
# LLAMA_ARG_HOST and LLAMA_API_KEY would change what the program does. GGML_NO_BACKTRACE: gdb would hold up a program
# that has failed. llama-server loads nothing from the network (--offline).
_ENVIRONMENT = (
    'for v in $(env | sed -n "s/^\\(LLAMA_[A-Za-z0-9_]*\\)=.*/\\1/p"); do unset $v; done; '
    "LD_LIBRARY_PATH=$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; CUDA_DEVICE_ORDER=PCI_BUS_ID; GGML_NO_BACKTRACE=1; "
    "export LD_LIBRARY_PATH CUDA_DEVICE_ORDER GGML_NO_BACKTRACE; "
)
_HEAD_SCRIPT = _ENVIRONMENT + 'shift; exec "$@"'
# A worker keeps the weights that it has got under the hash of their bytes (option -c), so that the next load need not
# send them again. It writes a file under its final name, and reads it without a check: a worker that was killed in the
# middle of a write leaves a part of a tensor there, which the next load would take for the whole (ggml-rpc.cpp,
# set_tensor and get_cached_file). So a file ``unfinished-PORT`` with the worker's pid stays until the model was loaded
# (``confirm_cache_argv``). If there is one of a worker that runs no more, the newest file of the cache is deleted. A
# full disk would leave parts of tensors, too: $2 KiB must be free, otherwise the worker runs without -c. $3: the port.
_WORKER_SCRIPT = _ENVIRONMENT + (
    f"LLAMA_CACHE={CACHE_FOLDER}; export LLAMA_CACHE; k=$2 u=$LLAMA_CACHE/unfinished-$3 x=; shift 3; "
    'if mkdir -p "$LLAMA_CACHE/rpc" && '
    'a=$(df -Pk "$LLAMA_CACHE" | sed -n "2s/.* \\([0-9][0-9]*\\)  *[0-9]*% .*/\\1/p") && [ "$a" -gt "$k" ]; then '
    'for m in "$LLAMA_CACHE"/unfinished-*; do [ -e "$m" ] || continue; '
    'case $(cat "/proc/$(cat "$m")/comm" 2>/dev/null) in *rpc-server*) continue;; esac; '
    'rm -f "$m"; x=1; done; '
    'f=$(ls -t "$LLAMA_CACHE/rpc" | head -n 1); [ -z "$x" ] || [ -z "$f" ] || rm -f "$LLAMA_CACHE/rpc/$f"; '
    'echo $$ >"$u" && set -- "$@" -c; fi; exec "$@"'
)


def confirm_cache_argv(port: int) -> tuple[str, ...]:
    """The command that tells the host of the worker on ``port`` that the model was loaded, so that all of the worker's
    cache is whole."""
    return ("sh", "-c", f'rm -f "{CACHE_FOLDER}/unfinished-$1"', "gpumesh-cache", str(port))


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where the head reaches a worker, as seen from the head's host: a port of its loopback."""

    node: str
    port: int

    @property
    def endpoint(self) -> str:
        return f"{LOOPBACK}:{self.port}"


def used_shares(member: MemberPlan) -> tuple[DeviceShare, ...]:
    """The member's devices that get layers, in the order of the layers."""
    return tuple(sorted((share for share in member.shares if share.layers), key=lambda share: share.first_layer))


def rpc_server_argv(member: MemberPlan, programs: HostPrograms, port: int) -> tuple[str, ...]:
    """The command of ggml-rpc-server for a worker: it offers the devices of the plan, in the plan's order.

    Raises PoolProgramMissing, and PoolFailed when llama.cpp does not see a GPU of the plan.
    """
    path = programs.need_rpc_server()
    shares = used_shares(member)
    devices = ",".join(device_name(share, programs) for share in shares)
    weights = sum(share.weights_bytes for share in shares)
    argv = [path, "-H", LOOPBACK, "-p", str(port), "-d", devices]
    argv += _thread_arguments(shares, programs)
    needed_kib = (weights + CACHE_RESERVE_BYTES) >> 10
    folder = programs.rpc_folder or "/"
    return ("sh", "-c", _WORKER_SCRIPT, "gpumesh-worker", folder, str(needed_kib), str(port), *argv)


def _draft_arguments(plan: PoolPlan, programs: HostPrograms, draft_path: str) -> list[str]:
    """The draft model is on the head's device of the plan. Without ``--spec-type`` it would be loaded and not used;
    without ``-devd`` it would take the workers' devices, too."""
    planned = [share for share in plan.head.shares if share.draft_bytes] or used_shares(plan.head)
    gpus = [device_name(share, programs) for share in planned if share.device.index is not None]
    argv = ["-md", draft_path, "--spec-type", "draft-simple"]
    argv += ["-devd", gpus[0], "-ngld", "99"] if gpus else ["-devd", "none", "-ngld", "0"]
    if plan.speed is not None and plan.speed.draft_length is not None:
        argv += ["--spec-draft-n-max", str(plan.speed.draft_length)]
    return argv


def _ngram_arguments() -> list[str]:
    """Proposes what followed the same tokens before, and at most as many as the plan has room for."""
    return ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", str(LONGEST_DRAFT)]


def _limit_streams(plan: PoolPlan) -> list[str]:
    """Ends a stream at the pool's context. Otherwise one stream could fill the whole shared KV cache, and then
    llama-server ends all streams with an error, also those that stay within their context.

    llama-server has no option for that, but gives no stream more than the context that the model was trained for
    (server-context.cpp, ``load_model``). So it is told that this is the pool's context. A model with learned positions
    could not be loaded then.
    """
    shape = plan.shape
    if plan.parallel == 1 or shape.learned_positions:
        return []
    limit = min(plan.context, shape.trained_context or plan.context)
    return ["--override-kv", f"{shape.architecture}.context_length=int:{limit}"]


def _thread_arguments(shares: Sequence[DeviceShare], programs: HostPrograms) -> list[str]:
    """The number of threads for layers on a CPU: ggml-rpc-server would use half of the cores. More threads than cores
    would make it a hundred times slower, because idle threads wait by spinning."""
    if programs.cores is None or all(share.device.index is not None for share in shares):
        return []
    return ["-t", str(programs.cores)]


def device_name(share: DeviceShare, programs: HostPrograms) -> str:
    """The name that llama.cpp on the host gives to the device. Raises PoolFailed when it does not see the GPU.

    llama.cpp numbers the GPUs that it sees as nvidia-smi does (CUDA_DEVICE_ORDER): CUDA0, or Vulkan0.
    """
    index = share.device.index
    if index is None:
        return "CPU"
    if index >= len(programs.gpus):
        seen = ", ".join(device.name for device in programs.devices) or "no device"
        raise PoolFailed(
            f"llama.cpp on {programs.node} does not see GPU {index}, {share.device.name}: it lists {seen}",
            hint="build it there with -DGGML_CUDA=ON, or install the release for this GPU",
            node=programs.node,
        )
    return programs.gpus[index].name


def llama_server_argv(
    plan: PoolPlan,
    programs: HostPrograms,
    *,
    model_path: str,
    workers: Sequence[WorkerAddress],
    port: int,
    alias: str,
    draft_path: str | None = None,
    drafts_by_ngram: bool = False,
) -> tuple[str, ...]:
    """The command of llama-server on the head for a plan that fits.

    ``workers`` has an address for each of ``plan.workers``, in any order. ``model_path`` and ``draft_path`` are paths
    on the head's host. Raises PoolProgramMissing, and PoolFailed when llama.cpp does not see a GPU of the plan.
    """
    path = programs.need_server()
    devices = head_devices(plan, programs)
    layers = [share.layers for _name, share in devices]
    argv = [path, "-m", model_path, "--host", LOOPBACK, "--port", str(port), "--alias", alias]
    argv += ["-c", str(plan.context * plan.parallel), "-np", str(plan.parallel)]
    argv += ["-ctk", plan.kv_type.value, "-ctv", plan.kv_type.value]
    argv += ["-fit", "off", "-sm", "layer", "-ngl", str(sum(layers))]
    if workers:
        endpoints = endpoints_by_node(workers)
        argv += ["--rpc", ",".join(endpoints[member.node] for member in plan.workers)]
    argv += ["--device", ",".join(name for name, _share in devices) or "none"]
    if len(devices) > 1:
        argv += ["-ts", ",".join(map(str, layers))]
    # The streams share one KV cache, so that they are always decoded in one step. (Otherwise only slots whose numbers
    # follow each other are: slots 0 and 2 would need two steps, each with all round trips.)
    argv += ["--kv-unified", *_limit_streams(plan)]
    # No copies of prompts in the head's memory: before a new prompt, the slot's old cache would come from the workers.
    argv += ["--cache-ram", "0", "--ctx-checkpoints", "0"]
    if draft_path is not None:
        argv += _draft_arguments(plan, programs, draft_path)
    elif drafts_by_ngram:
        argv += _ngram_arguments()
    argv += _thread_arguments(used_shares(plan.head), programs)
    argv += ["--metrics", "--slots", "--offline", "-lv", "4"]
    return ("sh", "-c", _HEAD_SCRIPT, "gpumesh-head", programs.server_folder or "/", *argv)


def head_devices(plan: PoolPlan, programs: HostPrograms) -> tuple[tuple[str, DeviceShare], ...]:
    """The devices to which llama-server gives layers, by its names for them, in the order of their layers.

    llama-server numbers the workers' devices in the order of its option --rpc: RPC0, RPC1. The layers of the head's CPU
    are the first ones of the model; they are on no such device. Raises PoolFailed.
    """
    devices: list[tuple[str, DeviceShare]] = []
    for share in used_shares(plan.head):
        if share.device.index is not None:
            devices.append((device_name(share, programs), share))
    worker_shares = [share for member in plan.workers for share in used_shares(member)]
    devices += [(f"RPC{number}", share) for number, share in enumerate(worker_shares)]
    return tuple(sorted(devices, key=lambda device: device[1].first_layer))


def endpoints_by_node(workers: Sequence[WorkerAddress]) -> Mapping[str, str]:
    """The endpoint of each worker, by its node."""
    return {worker.node: worker.endpoint for worker in workers}


def nodes_by_endpoint(workers: Sequence[WorkerAddress]) -> Mapping[str, str]:
    """The node of each worker, by its endpoint as llama-server's log names it."""
    return {worker.endpoint: worker.node for worker in workers}
