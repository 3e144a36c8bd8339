"""The mesh inside of a program of your own: no gateway, no HTTP, the same tunnels, balancing and failover.

pip install ..                           the clone; what pipx installs, other programs do not see
python library.py mesh.yaml [MODEL]      your hosts
python library.py                        two simulated ones, so that there is something to see
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import gpumesh
from gpumesh.backends.base import ChatRequest, Message
from gpumesh.balancer.base import Priority
from gpumesh.errors import GPUMeshError
from gpumesh.lab import demo_hosts
from gpumesh.lab.lab import Lab


async def talk(file: Path, model: str | None) -> None:
    async with gpumesh.Mesh.from_file(file) as mesh:
        # Tunnels open side by side; a request needs no more than the first node that is ready.
        await mesh.wait_usable(model, timeout_s=20)

        # What is there. Every figure that `gpumesh status` shows is in here; unknown is None.
        state = await mesh.wait_first_report(timeout_s=10)
        for node in state.nodes:
            gpus = ", ".join(gpu.name for gpu in node.gpus or ()) or "no GPU known"
            print(f"{node.name}: {node.health}, {gpus}, models: {', '.join(node.backend.models) or 'none'}")
        chosen = model or next(name for node in state.nodes for name in node.backend.models)

        # One answer as it comes. Leaving the block early stops the generation on the host.
        async with mesh.chat(chosen, "Why is the sky blue?", priority=Priority.INTERACTIVE) as stream:
            async for chunk in stream:
                print(chunk.text, end="", flush=True)
        rate = None if stream.counters is None else stream.counters.tokens_per_s
        print(f"\n({stream.node}, {rate or 0:.0f} tokens/s)")

        # Many at once: the mesh holds what cannot run yet, so they may all be started. `batch` lets others go first.
        async def ask(number: int) -> str:
            request = ChatRequest(
                chosen, (Message("user", f"Say {number}"),), options={"num_predict": 12}, stream=False
            )
            stream = mesh.chat(request, priority=Priority.BATCH, timeout_s=120)
            said = "".join([chunk.text async for chunk in stream])
            return f"{number:2} by {stream.node}: {said[:60]}"

        for answer in await asyncio.gather(*(ask(number) for number in range(8))):
            print(answer)

        # What went wrong is one kind of exception, with a sentence for people and what to do about it.
        try:
            async with mesh.chat("no-such-model", "Hello?"):
                pass
        except GPUMeshError as error:
            print(f"{type(error).__name__}: {error.message}; {error.hint}")


async def main(file: str | None = None, model: str | None = None) -> None:
    if file is not None:
        await talk(Path(file), model)
        return
    with tempfile.TemporaryDirectory() as folder:
        async with Lab(demo_hosts.make_hosts(2, load_s=0.2), Path(folder)) as lab:
            await talk(lab.write_config(Path(folder) / "mesh.yaml"), None)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
