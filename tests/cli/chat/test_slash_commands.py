from __future__ import annotations

from pathlib import Path

import pytest

from gpumesh import config
from gpumesh.cli.chat.chat_fleet import ChatFleet
from gpumesh.cli.chat.conversation import Conversation
from gpumesh.cli.chat.slash_commands import SlashCommands
from gpumesh.cli.fleet_models import FleetModels
from gpumesh.daemon.sessions.local_session import LocalSession
from gpumesh.errors import GPUMeshError
from gpumesh.mesh.mesh import Mesh

MESH_YAML = """
version: 1
name: home
models: {"qwen2.5:7b": {aliases: [gpt-4o-mini]}}
nodes: [{name: alpha, backend: {url: "http://127.0.0.1:1"}}]
"""


class Typed:
    """The commands over a mesh that was never opened, and what they have printed. Questions are answered with no."""

    def __init__(self) -> None:
        topology = config.parse(MESH_YAML, file="mesh.yaml", env={}, home=Path("/"), source=None)
        mesh = Mesh(topology)
        state = mesh.snapshot()
        fleet = ChatFleet(LocalSession(mesh), topology, FleetModels.of(state, topology), state)
        self.printed: list[str] = []
        self.kept: list[bool] = []
        self.conversation = Conversation("qwen2.5:7b")
        self.commands = SlashCommands(
            self.conversation, fleet, say=self.printed.append, confirm=self.refuse, keep_history=self.kept.append
        )

    async def refuse(self, _: str) -> bool:
        return False

    async def __call__(self, name: str, words: str = "") -> str:
        try:
            await self.commands.run(name, words)
        except GPUMeshError as error:
            return f"error: {error.message}"
        return self.printed[-1] if self.printed else ""


@pytest.fixture
async def typed() -> Typed:
    return Typed()


async def test_parameters(typed: Typed) -> None:
    options = typed.conversation.options
    assert await typed("set", "parameter temperature 0.5") == "temperature is 0.5"
    await typed("set", "parameter stop ###")
    await typed("set", 'parameter  stop ["a", "b"]')
    assert options == {"temperature": 0.5, "stop": ["a", "b"]}
    await typed("set", "parameter stop")
    assert options == {"temperature": 0.5}
    assert await typed("set", "parameter temperature warm") == "error: temperature is a number"
    assert "did you mean num_ctx?" in await typed("set", "parameter num_ctxx 5")
    assert "num_ctx" in await typed("set", "parameter")
    assert options == {"temperature": 0.5}
    assert "parameters  temperature=0.5" in await typed("show")


async def test_settings(typed: Typed) -> None:
    await typed("set", 'system """Be\nbrief."""')
    assert typed.conversation.system == "Be\nbrief."
    assert "system      Be\n            brief." in await typed("show")
    await typed("set", "system")
    assert typed.conversation.system is None
    for words, think in (("think", True), ("think high", "high"), ("nothink", False)):
        await typed("set", words)
        assert typed.conversation.think == think
    await typed("set", "nohistory")
    await typed("set", "history")
    assert typed.kept == [False, True]
    await typed("set", "quiet")
    assert not typed.commands.is_verbose
    assert "did you mean system?" in await typed("set", "sytem x")
    assert await typed("set") == "error: set what?"


async def test_models_and_nodes(typed: Typed) -> None:
    await typed("model", "gpt-4o-mini")
    assert typed.conversation.model == "gpt-4o-mini"
    assert await typed("model", "phi4") == "error: no node that is up has the model 'phi4'"
    assert typed.conversation.model == "gpt-4o-mini"
    await typed("node", "alpha")
    assert typed.conversation.node == "alpha"
    assert "did you mean alpha?" in await typed("node", "alpah")
    await typed("nodes", "auto")
    assert typed.conversation.node is None


async def test_a_file_is_never_lost(typed: Typed, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("precious")
    assert "was left as it is" in await typed("save", str(file))
    assert file.read_text() == "precious"
    assert (await typed("load", str(file))).endswith("is no saved chat: it is not JSON")
    assert (await typed("save", str(tmp_path))).endswith("is a folder")
    assert "No such file" in await typed("save", str(tmp_path / "none" / "b.json"))
    assert "No such file" in await typed("load", f'"{tmp_path / "b.json"}"')
    assert await typed("save") == "error: which file?"
    assert "cannot tell which folder" in await typed("load", "~nobody-of-this-name/x")


async def test_the_end(typed: Typed) -> None:
    assert "did you mean /save?" in await typed("sav")
    await typed("quit")
    assert typed.commands.is_ended
