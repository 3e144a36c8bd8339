"""The mesh inside of a program of your own: it joins the mesh that runs, or opens one. docs/library.md has all of it.

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
from gpumesh.lab import demo_hosts
from gpumesh.lab.lab import Lab


async def talk(file: Path, model: str | None) -> None:
    async with gpumesh.connect(file) as mesh:
        # What is there. Every figure that `gpumesh status` shows is in here; unknown is None.
        for node in (await mesh.status()).nodes:
            gpus = ", ".join(gpu.name for gpu in node.gpus or ()) or "no GPU known"
            print(f"{node.name}: {node.health}, {gpus}, models: {', '.join(node.backend.models) or 'none'}")
        chosen = model or (await mesh.models())[0].name

        # One answer as it comes. Leaving the block early stops the generation on the host.
        async with mesh.chat(chosen, "Why is the sky blue?", priority="interactive") as reply:
            async for chunk in reply:
                print(chunk.text, end="", flush=True)
        answer = await reply  # the whole, with its figures
        print(f"\n({answer.node}, {answer.tokens_per_s or 0:.0f} tokens/s)")

        # Many: a few at a time, results in order. They have the priority `batch`, which lets others go first.
        prompts = (f"Say {number}" for number in range(8))
        async for result in mesh.run_many(prompts, model=chosen, options={"num_predict": 12}, timeout=120):
            print(f"{result.index:2} by {result.result().node}: {result.text[:60]}")

        # What went wrong is one kind of exception, with a sentence for people and what to do about it.
        try:
            await mesh.chat("no-such-model", [{"role": "user", "content": "Hello?"}])
        except gpumesh.GPUMeshError as error:
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
