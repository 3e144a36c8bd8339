from __future__ import annotations

import asyncio

from gpumesh.mesh.nodes.tunnel_link import TunnelLink
from gpumesh.state import TunnelPhase, TunnelState
from gpumesh.tunnels.direct.tunnel import DirectTunnel
from tests.mesh.nodes.build import make_spec

SPEC = make_spec("http://127.0.0.1:9")
UP = TunnelState("direct", TunnelPhase.UP, rtt_ms=3.0)
LOST = TunnelState("direct", TunnelPhase.BACKOFF)


def test_a_link_without_a_tunnel_is_down_and_has_no_urls() -> None:
    link = TunnelLink(SPEC)
    assert not link.is_up
    assert link.urls == {}
    assert link.state.state is TunnelPhase.IDLE
    link.suspect("nothing happens")


def test_each_new_connection_is_counted_once() -> None:
    link = TunnelLink(SPEC)
    for state in (UP, UP, LOST, UP):
        link.update(state)
    assert link.connection_count == 2
    assert repr(link) == "<TunnelLink direct up connection 2>"


async def test_each_new_connection_has_its_own_commands() -> None:
    link = TunnelLink(SPEC)
    link.tunnel = DirectTunnel(SPEC, on_change=link.update)
    assert link.commands is None
    link.update(UP)
    first = link.commands
    assert first is not None
    waiting = asyncio.create_task(link.wait_down())
    await asyncio.sleep(0)
    link.update(UP)
    assert (link.commands is first, waiting.done()) == (True, False)
    link.update(LOST)
    assert link.commands is first
    link.update(UP)
    await asyncio.wait_for(waiting, 20)
    assert link.commands is not first


async def test_wait_up_returns_the_tunnel() -> None:
    link = TunnelLink(SPEC)
    tunnel = link.tunnel = DirectTunnel(SPEC, on_change=link.update)
    waiting = asyncio.create_task(link.wait_up())
    await asyncio.sleep(0)
    assert not waiting.done()
    link.update(UP)
    assert await waiting is tunnel
    assert list(link.urls.values()) == ["http://127.0.0.1:9"]
