"""Plans and states of pools as a test makes them up: a 70B model on two 4090s."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from gpumesh.pool_spec import KvType
from gpumesh.pools.base import (
    DeviceOffer,
    DeviceShare,
    MemberPlan,
    MemberState,
    ModelShape,
    PathKind,
    PoolPhase,
    PoolPlan,
    PoolState,
    SpeedForecast,
    WorkerPath,
)

GIB = 2**30
SINCE = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
NOW = SINCE + timedelta(hours=2)
FAR = WorkerPath(PathKind.THROUGH_US, 41.3, 110e6)


def shape(**changes: Any) -> ModelShape:
    usual: dict[str, Any] = {
        "architecture": "llama",
        "name": "Llama 3.3 70B Instruct",
        "file_type": "Q4_K_M",
        "layer_bytes": (500 * 2**20,) * 80,
        "input_bytes": GIB // 2,
        "output_bytes": GIB // 2,
        "kv_elements": (2048,) * 80,
        "embedding": 8192,
        "vocabulary": 128256,
        "heads": 64,
        "trained_context": 131072,
        "parameters": 70_553_706_496,
        "file_bytes": 42_520_393_472,
    }
    return ModelShape(**{**usual, **changes})


def share(first_layer: int, layers: int, **changes: Any) -> DeviceShare:
    device = DeviceOffer("NVIDIA GeForce RTX 4090", 0, 24 * GIB, 23 * GIB, 1.0e12)
    usual: dict[str, Any] = {
        "device": device,
        "first_layer": first_layer,
        "layers": layers,
        "weights_bytes": layers * 500 * 2**20,
        "kv_bytes": layers * 32 * 2**20,
        "compute_bytes": GIB // 2,
        "offered_bytes": 22 * GIB + GIB // 2,
    }
    return DeviceShare(**{**usual, **changes})


SPEED = SpeedForecast(11.24, 4, 38.0, 41.0, 48.0, 19.3, 0.7)


def plan(**changes: Any) -> PoolPlan:
    usual: dict[str, Any] = {
        "pool": "big",
        "model": "llama3.3:70b",
        "shape": shape(),
        "members": (
            MemberPlan("vengeance", True, (share(41, 40),)),
            MemberPlan("iceland", False, (share(0, 41),), FAR),
        ),
        "context": 16384,
        "parallel": 4,
        "kv_type": KvType.Q8_0,
        "sent_bytes": 20 * GIB,
        "load_s": 372.0,
        "speed": SPEED,
        "draft": shape(name="Llama 3.2 1B", file_bytes=1_300_000_000),
        "advice": ("one node alone, vengeance with Q2_K (23.1 GiB), would be faster: 31 tokens/s",),
    }
    return PoolPlan(**{**usual, **changes})


def unfit_plan() -> PoolPlan:
    small = DeviceOffer("NVIDIA GeForce RTX 3060", 1, 12 * GIB, 2 * GIB, None, 8 * GIB)
    return plan(
        members=(
            MemberPlan("vengeance", True, (share(47, 34), share(41, 6, device=small, offered_bytes=2 * GIB))),
            MemberPlan("iceland", False, (share(0, 41, kv_bytes=9 * GIB),), FAR),
            MemberPlan(
                "cpu-box-with-a-long-name",
                False,
                (
                    share(
                        0,
                        0,
                        weights_bytes=0,
                        compute_bytes=0,
                        device=DeviceOffer("CPU", None, None, 8 * GIB),
                        offered_bytes=8 * GIB,
                    ),
                ),
                WorkerPath(PathKind.HEAD_TO_WORKER, None),
            ),
        ),
        problems=("7.0 GiB more are needed on iceland", "2.1 GiB more are needed on vengeance"),
        advice=("`context: 8192` would fit", "`kv_type: q4_0` would fit"),
        speed=None,
        load_s=None,
        sent_bytes=None,
        draft=None,
    )


def member(node: str, **changes: Any) -> MemberState:
    usual: dict[str, Any] = {"is_head": False, "layers": 41, "planned_bytes": 22 * GIB, "path": FAR}
    return MemberState(node, **{**usual, **changes})


def state(phase: PoolPhase, **changes: Any) -> PoolState:
    usual: dict[str, Any] = {
        "pool": "big",
        "model": "llama3.3:70b",
        "phase": phase,
        "since": SINCE,
        "starts": 1,
        "members": (
            member("vengeance", is_head=True, layers=40, path=None, measured_bytes=int(21.9 * GIB)),
            member("iceland", measured_bytes=int(22.3 * GIB)),
        ),
        "predicted": SPEED,
    }
    return PoolState(**{**usual, **changes})
