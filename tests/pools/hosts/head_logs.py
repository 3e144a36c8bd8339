"""Lines of llama-server's log, as build 10434 wrote them with ``-lv 4``; the plan that they belong to."""

from __future__ import annotations

from gpumesh.pool_spec import KvType
from gpumesh.pools.base import DeviceOffer, DeviceShare, MemberPlan, ModelShape, PathKind, PoolPlan, WorkerPath
from gpumesh.pools.hosts.commands import WorkerAddress
from gpumesh.pools.hosts.programs import HostPrograms, ProgramDevice

MIB = 1 << 20
GPU = "NVIDIA GeForce RTX 4090"
WORKERS = (WorkerAddress("cellar", 21001), WorkerAddress("attic", 21002))
# A head with a GPU, one worker with a GPU, one with its CPU: 8 layers and the output.
LOADED = """\
0.00.006.260 I cmn  common_param:   - RPC0    : 127.0.0.1:21001 (24105 MiB, 24105 MiB free)
0.00.042.578 I srv    load_model: loading model '/models/big.gguf'
0.00.009.445 I llama_prepare_model_devices: using device RPC0 (127.0.0.1:21001) (unknown id) - 24105 MiB free
0.00.009.445 I llama_prepare_model_devices: using device RPC1 (127.0.0.1:21002) (unknown id) - 24105 MiB free
0.00.009.621 I llama_prepare_model_devices: using device CUDA0 (NVIDIA GeForce RTX 4090) (0000:01:00.0) - 24105 MiB free
0.00.011.081 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
AMX is not ready to be used!
0.00.012.968 I load_tensors: offloaded 9/9 layers to GPU
0.00.012.991 I load_tensors:   CPU_Mapped model buffer size =   500.06 MiB
0.00.013.004 I load_tensors: RPC0[127.0.0.1:21001] model buffer size =  3000.10 MiB
0.00.013.004 I load_tensors: RPC0[127.0.0.1:21002] model buffer size =  1000.20 MiB
0.00.013.004 I load_tensors:        CUDA0 model buffer size =  4500.30 MiB
0.00.016.776 I llama_context:  CUDA_Host  output buffer size =     0.49 MiB
0.00.017.212 I llama_kv_cache: RPC0[127.0.0.1:21001] KV buffer size =   150.00 MiB
0.00.017.212 I llama_kv_cache: RPC0[127.0.0.1:21001] KV buffer size =   150.00 MiB
0.00.019.503 I llama_kv_cache: RPC0[127.0.0.1:21002] KV buffer size =   100.00 MiB
0.00.019.503 I llama_kv_cache:      CUDA0 KV buffer size =   400.00 MiB
0.00.025.946 I sched_reserve: RPC0[127.0.0.1:21001] compute buffer size =   999.00 MiB
0.00.025.946 I sched_reserve: RPC0[127.0.0.1:21001] compute buffer size =   300.00 MiB
0.00.025.976 I sched_reserve: RPC0[127.0.0.1:21002] compute buffer size =   300.00 MiB
0.00.025.976 I sched_reserve:      CUDA0 compute buffer size =   310.00 MiB
0.00.025.989 I sched_reserve:  CUDA_Host compute buffer size =    12.26 MiB
""".splitlines()
READY = [
    "0.00.032.552 I srv  llama_server: model loaded",
    "0.00.032.578 I srv  llama_server: listening on http://127.0.0.1:51080",
]
DRAFT = """\
0.00.119.691 I common_speculative_init_result: loading draft model '/models/small.gguf'
0.00.121.997 I load_tensors:        CUDA0 model buffer size =   700.00 MiB
0.00.122.379 I llama_kv_cache:      CUDA0 KV buffer size =    64.00 MiB
0.00.126.216 I sched_reserve:      CUDA0 compute buffer size =    90.00 MiB
""".splitlines()
TIMING = (
    "0.00.224.637 I slot print_timing: id  1 | task 0 | draft acceptance = 0.50000"
    " (   11 accepted /    22 generated), mean len =  2.38"
)


def head_programs() -> HostPrograms:
    return HostPrograms(
        "iceland", server="/opt/llama/llama-server", server_folder="/opt/llama", devices=(cuda(0),), cores=16
    )


def cuda(number: int) -> ProgramDevice:
    return ProgramDevice(f"CUDA{number}", GPU, 24564 * MIB, 24105 * MIB)


def share(first: int, count: int, *, index: int | None = 0) -> DeviceShare:
    """Each layer has 1000 MiB of weights and 100 MiB of cache; the output has 500 MiB of weights."""
    has_output = first + count == 9
    layers = count - 1 if has_output else count
    device = DeviceOffer(GPU if index is not None else "CPU", index, 24564 * MIB, 24105 * MIB)
    weights = 1000 * layers + (500 if has_output else 0)
    return DeviceShare(device, first, count, weights * MIB, 100 * layers * MIB, 300 * MIB, 24000 * MIB)


def make_plan(**changes: object) -> PoolPlan:
    shape = ModelShape(
        architecture="llama", name="big", file_type="Q4_K_M", layer_bytes=(1000 * MIB,) * 8, input_bytes=500 * MIB,
        output_bytes=500 * MIB, kv_elements=(1024,) * 8, embedding=4096, vocabulary=128_000, heads=32,
        trained_context=131_072, parameters=70_000_000_000, file_bytes=9000 * MIB,
    )  # fmt: skip
    way = WorkerPath(PathKind.THROUGH_US, 40.0)
    given: dict[str, object] = {
        "pool": "big",
        "model": "/models/big.gguf",
        "shape": shape,
        "members": (
            MemberPlan("iceland", True, (share(4, 5),)),
            MemberPlan("cellar", False, (share(0, 3),), way),
            MemberPlan("attic", False, (share(3, 1, index=None),), way),
        ),
        "context": 4096,
        "parallel": 4,
        "kv_type": KvType.F16,
        **changes,
    }
    return PoolPlan(**given)  # type: ignore[arg-type]
