"""Makes a mesh's ``Coordination``: over Redis if mesh.yaml has the section ``redis``, else of a single gateway."""

from __future__ import annotations

from collections.abc import Callable, Collection

from gpumesh import config
from gpumesh.config.extras import need_extra
from gpumesh.coordination.base import Coordination
from gpumesh.coordination.single_gateway import SingleGateway
from gpumesh.topology import RedisSpec


def create_coordination(
    spec: RedisSpec | None,
    *,
    mesh: str,
    on_change: Callable[[Collection[str]], None],
    clock: Callable[[], float],
) -> Coordination:
    """Returns the coordination over the Redis of ``spec``; a ``SingleGateway`` if ``spec`` is ``None``. Raises
    GPUMeshError if redis-py is not installed, as most meshes do not need it.

    ``mesh`` is the mesh's name: gateways of one mesh share places. ``on_change`` is called on the event loop with the
    keys whose places have changed, and with no key when only the findings have. ``clock`` returns monotonic seconds.
    """
    if spec is None:
        return SingleGateway()
    with need_extra("redis", "`redis:` in mesh.yaml"):
        from gpumesh.coordination.several_gateways import SeveralGateways

    return SeveralGateways(
        spec.url,
        mesh=mesh,
        password=lambda: _read_password(spec.password_env),
        on_change=on_change,
        clock=clock,
        ca_file=spec.ca_file,
        sentinel_password=lambda: _read_password(spec.sentinel_password_env),
    )


def _read_password(variable: str | None) -> str | None:
    return None if variable is None else config.read_secret(variable)
