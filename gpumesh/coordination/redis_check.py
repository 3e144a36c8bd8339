"""Asks the Redis of mesh.yaml whether gateways can share a mesh over it, for `gpumesh doctor`.

What Redis prints is hostile until parsed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoPermissionError, RedisError

from gpumesh import config
from gpumesh.coordination.redis_connection import RedisConnection, find_master, open_connection
from gpumesh.coordination.redis_urls import read_address
from gpumesh.coordination.several_gateways import ALL_CHANNEL, VERSION
from gpumesh.coordination.step_messages import StepRequest, encode_request
from gpumesh.coordination.timing import DEFAULT_TIMING, SLOW_S
from gpumesh.errors import GPUMeshError
from gpumesh.event_loop.stall_timeout import stall_timeout
from gpumesh.text.printable import printable
from gpumesh.text.versions import version_key
from gpumesh.topology import RedisSpec

OLDEST_VERSION = "6.2"  # XAUTOCLAIM, which durable batches use, came with 6.2
PINGS = 5
FULL_SHARE = 0.9  # of the memory that Redis may use
MAX_INFO_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class RedisReport:
    """What Redis answered. ``server`` is its kind and version, ``answer_ms`` the median time of an answer, ``gateways``
    how many gateways of the mesh live. ``problems`` are sentences; empty if all is well."""

    server: str
    answer_ms: float
    gateways: int
    problems: tuple[str, ...]


async def check_redis(spec: RedisSpec, mesh: str) -> RedisReport:
    """Connects as a gateway of ``mesh`` does, and looks at what it needs. Raises GPUMeshError with the reason if it
    cannot connect."""
    try:
        return await _check(spec, mesh)
    except TimeoutError as error:
        raise GPUMeshError("no answer in time") from error
    # A server that is no Redis makes redis-py raise more than it documents.
    except (RedisError, OSError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise GPUMeshError(printable(str(error)) or type(error).__name__) from error


async def _check(spec: RedisSpec, mesh: str) -> RedisReport:
    sentinel_password, password = (
        None if variable is None else config.read_secret(variable)
        for variable in (spec.sentinel_password_env, spec.password_env)
    )
    address = read_address(spec.url, ca_file=spec.ca_file, read_sentinel_password=lambda: sentinel_password)
    async with stall_timeout(DEFAULT_TIMING.connect_s):
        if address.sentinels:
            address = await find_master(address, DEFAULT_TIMING)
        connection = await open_connection(address, password)
    prefix = f"gpumesh:{VERSION}:{{{mesh}}}:"
    try:
        async with stall_timeout(DEFAULT_TIMING.connect_s):
            times_ms = [await _ping_ms(connection) for _ in range(PINGS)]
            facts = await _read_info(connection)
            gateways = await _ask(connection, "HLEN", f"{prefix}gateways")
    finally:
        await connection.disconnect(nowait=True)
    problems = list(_find_problems(facts, median(times_ms)))
    try:
        async with RedisConnection.open(address, password, prefix, (ALL_CHANNEL,), DEFAULT_TIMING) as shared:
            for step in _trial_steps():
                await shared.step(encode_request(step))
    except (RedisError, TimeoutError) as error:
        problems.insert(0, f"it refuses what sharing needs: {printable(str(error), 200) or 'no answer in time'}")
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version") or facts.get("redis_version") or "of an unknown version"
    return RedisReport(
        f"{name} {version}", round(median(times_ms), 2), gateways if isinstance(gateways, int) else 0, tuple(problems)
    )


def _trial_steps() -> Iterator[StepRequest]:
    """The steps of a gateway that comes, holds nothing, and leaves: they use all that a gateway needs of Redis."""
    gateway = secrets.token_hex(8)
    for leaves in (False, True):
        yield StepRequest(
            gateway,
            1,
            dead_s=DEFAULT_TIMING.dead_s,
            share_s=DEFAULT_TIMING.share_s,
            registers=not leaves,
            leaves=leaves,
        )


async def _ask(connection: AbstractConnection, *command: str) -> object:
    """The answer; ``None`` if this user may not ask."""
    await connection.send_command(*command)
    try:
        answer: object = await connection.read_response()
    except NoPermissionError:
        return None
    return answer


async def _ping_ms(connection: AbstractConnection) -> float:
    began = time.monotonic()
    await _ask(connection, "PING")
    return (time.monotonic() - began) * 1000.0


async def _read_info(connection: AbstractConnection) -> Mapping[str, str]:
    """The facts that the server tells of itself, by name; none if this user may not ask."""
    answer = await _ask(connection, "INFO")
    if not isinstance(answer, bytes):
        return {}
    lines = answer[:MAX_INFO_BYTES].decode("utf-8", "replace").splitlines()
    pairs = (line.partition(":")[::2] for line in lines if not line.startswith("#"))
    return {name: printable(value, 60) for name, value in pairs}


def _find_problems(facts: Mapping[str, str], answer_ms: float) -> Iterator[str]:
    """What keeps gateways from sharing a mesh, or batches from being durable. What is not known is no problem."""
    version, oldest_version = version_key(facts.get("redis_version", "")), version_key(OLDEST_VERSION)
    if version is not None and oldest_version is not None and version < oldest_version:
        yield f"it is older than {OLDEST_VERSION}, which durable batches need"
    if facts.get("role") == "slave":
        yield "it is a replica, which may only be read"
    if answer_ms >= DEFAULT_TIMING.answer_s * 1000.0:
        yield f"it needs {answer_ms:.0f} ms for an answer: gateways would go on alone"
    elif answer_ms >= SLOW_S * 1000.0:
        yield f"it needs {answer_ms:.0f} ms for an answer, and each request on a shared node waits for one or two"
    used, allowed = (_read_count(facts.get(name, "")) for name in ("used_memory", "maxmemory"))
    if allowed and used > FULL_SHARE * allowed:
        yield f"it uses {used / allowed:.0%} of the memory that it may use (maxmemory)"
    policy = facts.get("maxmemory_policy", "noeviction")
    if allowed and policy != "noeviction":
        yield f"its maxmemory-policy is {policy}: it may throw batches away; set noeviction"
    if facts.get("aof_enabled") == "0":
        yield "its appendonly is off: what it was told last, batches too, may be lost when it is restarted"


def _read_count(text: str) -> int:
    """A count as Redis prints it; 0 for a text that is none."""
    return int(text) if text.isascii() and text.isdigit() else 0
