"""The image's recipe and the compose file, as far as they can be held without Docker: nothing is built here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from gpumesh.cli.root_command import app

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "docker" / "compose.yaml").read_text())


def instruction(name: str) -> str:
    """What stands behind the last instruction of this name."""
    lines = re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
    return [line for line in lines if line.startswith(f"{name} ")][-1].removeprefix(f"{name} ")


def test_all_that_is_copied_is_there_and_nothing_else_gets_into_the_build() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {name for line in copies for name in line.split()}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_is_not_root_and_starts_a_command_that_exists() -> None:
    assert instruction("USER") == "${UID}"
    program, (command, *arguments) = json.loads(instruction("ENTRYPOINT")), json.loads(instruction("CMD"))
    assert program == ["gpumesh"]
    parsed = get_command(app).commands[command].make_context(command, list(arguments), resilient_parsing=True)  # type: ignore[attr-defined]
    assert parsed.params["listen"] == "0.0.0.0:11430"
    assert f"EXPOSE {parsed.params['listen'].partition(':')[2]}" in DOCKERFILE
    assert "http://127.0.0.1:11430/healthz" in instruction("HEALTHCHECK")


def test_the_services_are_for_this_machine_alone_and_their_secrets_come_from_outside() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"gpumesh", "open-webui"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        secrets = {name: text for name, text in service["environment"].items() if name.endswith("KEY")}
        assert secrets
        assert all(re.fullmatch(r"\$\{\w+:\?.+\}", text) for text in secrets.values())
    base = ROOT / "examples" / "docker"
    assert (base / services["gpumesh"]["build"]["context"]).resolve() == ROOT
    for volume in services["gpumesh"]["volumes"]:
        source = volume.partition(":")[0]
        assert (base / source).exists() or source.startswith("${HOME}") or source in COMPOSE["volumes"]
    url = services["open-webui"]["environment"]["OPENAI_API_BASE_URL"]
    assert url == "http://gpumesh:11430/v1"
