"""Captures what the documentation shows: real output of the installed command, on simulated hosts with real SSH.

    python docs/capture.py
    python docs/capture.py --figures     also the tables of benchmarks; on a machine that does nothing else
    python docs/capture.py --page        only docs/how-to/page.png, for which it needs Chromium and playwright

It fills the blocks between `<!-- captured: NAME -->` and `<!-- end -->` in README.md and docs/*.md, and writes
docs/status.svg. What differs from run to run (ports, times, figures) differs here, too: commit it when the *look* has
changed.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

import httpx
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from gpumesh.lab import demo_hosts, profile
from gpumesh.lab.lab import Lab

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GPUMESH = Path(sys.executable).with_name("gpumesh")
WIDTH = 100
# What belongs to the machine on which this runs, and says nothing to a reader.
PLAIN = (
    (re.compile(r"/tmp/gm-[^/ ]+/(?=[a-z-]+\.yaml)"), ""),
    (re.compile(r"/tmp/gm-[^/ ]+(?=/)"), "~"),
    (re.compile(r"\(pid \d+\)"), "(pid 4711)"),
)


class Terminal:
    """Runs commands as a person would, and keeps what they print."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._folder = folder
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "PYTHONIOENCODING": "utf-8",
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "GPUMESH_CONFIG": str(config),
            "LINES": "50",
        }

    async def run(self, line: str, *, colour: bool = False, width: int = WIDTH) -> str:
        """stdout and stderr of `gpumesh …`, below the line itself."""
        more = {"FORCE_COLOR": "1", "TERM": "xterm-256color"} if colour else {}
        process = await asyncio.create_subprocess_exec(
            GPUMESH,
            *shlex.split(line)[1:],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**self._environment, **more, "COLUMNS": str(width)},
            cwd=self._folder,
        )
        out, _ = await process.communicate()
        text = out.decode().rstrip()
        for pattern, instead in PLAIN:
            text = pattern.sub(instead, text)
        return f"$ {line}\n" + "\n".join(part.rstrip() for part in text.splitlines())


def a_dead_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def working_mesh(folder: Path) -> dict[str, str]:
    """Three hosts at work, one of them ill."""
    async with Lab(demo_hosts.make_hosts(3), folder) as lab:
        terminal = Terminal(folder, lab.write_config(folder / "mesh.yaml", default_model="qwen2.5:7b"))
        up = await terminal.run("gpumesh up -d")
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(f"Tell me about {number}." for number in range(24)))
        load = asyncio.create_task(terminal.run(f"gpumesh run -f {prompts} --quiet"))
        await asyncio.sleep(7)  # until all hosts are busy, and have been for as long as nvidia-smi averages
        await lab.host("oslo").kill()
        await asyncio.sleep(3)
        status = await terminal.run("gpumesh status")
        coloured = await terminal.run("gpumesh status", colour=True)
        await load
        await terminal.run("gpumesh down")
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(coloured))
    svg = console.export_svg(title="gpumesh status", theme=MONOKAI)
    # Fonts from elsewhere are not wanted: whoever reads this has one with fixed width.
    (DOCS / "status.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))
    return {"up": up, "status": status}


async def from_an_ssh_line(folder: Path) -> dict[str, str]:
    """The tutorial: one host, a line as a provider prints it."""
    async with Lab([profile.make_host("iceland", backend_port=80)], folder) as lab:
        ssh = folder / ".ssh"
        ssh.mkdir(mode=0o700)
        lab.identity.rename(ssh / "id_ed25519")
        file = folder / "mesh.yaml"
        terminal = Terminal(folder, file)
        line = f"ssh root@127.0.0.1 -p {lab.host('iceland').ssh_port} -i ~/.ssh/id_ed25519"
        init = await terminal.run(f"gpumesh init --yes --from iceland='{line}'")
        return {"init": init, "mesh.yaml": file.read_text().rstrip()}


async def two_ways_to_one(folder: Path) -> dict[str, str]:
    """Where this project began: a 4090 that was expected twice, and is one, reached in two ways."""
    host = profile.make_host("iceland")
    async with Lab([host], folder) as lab:
        iceland = lab.host("iceland")
        expect = {"gpus": 1, "gpu": "NVIDIA GeForce RTX 4090", "vram_mib": 24564}
        nodes = [
            {**iceland.node_entry(), "expect": {**expect, "hostname": host.hostname}},
            {
                "name": "vengeance",
                "backend": {"urls": [iceland.backend_url, f"http://127.0.0.1:{a_dead_port()}"]},
                "expect": expect,
            },
            {"name": "runpod", "backend": {"urls": [f"http://127.0.0.1:{a_dead_port()}"]}},
        ]
        terminal = Terminal(folder, lab.write_config(folder / "mesh.yaml", nodes=nodes))
        audit = await terminal.run("gpumesh audit", width=140)
        write = await terminal.run("gpumesh audit --write --yes", width=140)
    return {
        "audit": audit,
        "drawing": "$ gpumesh audit\n…\n" + audit.rpartition("\n\n")[2],
        "write": "$ gpumesh audit --write --yes\n…\n" + write[write.index("--- mesh.yaml") :],
    }


async def ask_again(url: str, name: str) -> None:
    """A client that asks one question after the other, until it is cancelled."""
    body = {"model": "qwen2.5:7b", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    async with httpx.AsyncClient(base_url=url, timeout=60, headers={"X-GPUMesh-Client": name}) as client:
        while True:
            await client.post("/api/chat", json=body)


async def page_picture(folder: Path) -> None:
    """Writes the page's picture: three hosts at work, one of which has just gone away."""
    from playwright.async_api import async_playwright

    port = a_dead_port()
    async with Lab(demo_hosts.make_hosts(3), folder) as lab, async_playwright() as playwright:
        terminal = Terminal(folder, lab.write_config(folder / "mesh.yaml", listen=f"127.0.0.1:{port}"))
        await terminal.run("gpumesh up -d")
        load = [asyncio.create_task(ask_again(f"http://127.0.0.1:{port}", name)) for name in ("alice", "bob", "webui")]
        chromium = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = await chromium.new_page(viewport={"width": 1200, "height": 1000})
        await page.goto(f"http://127.0.0.1:{port}/ui")
        await page.get_by_role("button", name="5 min", exact=True).click()
        await asyncio.sleep(80)  # so that the plots have something to show
        await lab.host("oslo").kill()
        await page.get_by_text("node-unreachable").wait_for()
        await asyncio.sleep(12)
        await page.screenshot(path=DOCS / "how-to" / "page.png", full_page=True)
        await chromium.close()
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
        await terminal.run("gpumesh down")


def figures() -> dict[str, str]:
    """What the benchmarks print whose figures README names."""
    shown = {}
    for name, arguments in (
        ("tunnel_rtt", ["--apart", "300"]),
        ("tunnel_streams", ["--streams", "32,256"]),
        ("gateway", ["--rounds", "3"]),
        ("scheduling", ["two-models-half", "num-ctx", "conversations", "second-client", "fresh-slots"]),
    ):
        command = ["benchmarks/" + name + ".py", *arguments]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        shown[name] = f"$ .venv/bin/python {shlex.join(command)}\n{done.stdout.rstrip()}"
    return shown


def fill(page: Path, captured: dict[str, str]) -> None:
    text = page.read_text()
    for name, output in captured.items():
        block = re.compile(rf"(<!-- captured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        filled = f"```{'yaml' if name.endswith('.yaml') else 'text'}\n{output}\n```\n"
        text = block.sub(lambda match, filled=filled: match[1] + filled + match[2], text)  # type: ignore[misc]
    if text != page.read_text():
        page.write_text(text)


async def main() -> None:
    if "--page" in sys.argv[1:]:
        with tempfile.TemporaryDirectory(prefix="gm-") as folder:
            await page_picture(Path(folder))
        return
    captured: dict[str, str] = {}
    for scene in (working_mesh, from_an_ssh_line, two_ways_to_one):
        with tempfile.TemporaryDirectory(prefix="gm-") as folder:
            captured.update(await scene(Path(folder)))
    if "--figures" in sys.argv[1:]:
        captured.update(figures())
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        fill(page, captured)
    for output in captured.values():
        print(output, end="\n\n")


if __name__ == "__main__":
    asyncio.run(main())
