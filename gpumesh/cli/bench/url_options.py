"""Reads the options of `bench run --url`: a server that belongs to no mesh, its API and its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpumesh.errors import UsageError

if TYPE_CHECKING:
    from gpumesh.bench.load.http.client_apis import ClientApi
    from gpumesh.bench.url_target import UrlTarget
    from gpumesh.bench.workload.settings import Scenario


@dataclass(frozen=True, slots=True)
class UrlOptions:
    """The server, its API, and the variable that holds its API key (``None``: it needs none)."""

    target: UrlTarget
    api: ClientApi
    key_variable: str | None

    def read_key(self) -> str | None:
        """The API key. Raises UsageError if its variable is empty or not set."""
        from gpumesh import config
        from gpumesh.errors import SecretMissing

        if self.key_variable is None:
            return None
        try:
            return config.read_secret(self.key_variable)
        except SecretMissing:
            raise UsageError(f"--key-env {self.key_variable}: this variable is empty or not set") from None


def parse_url_options(
    url: str | None,
    api: str | None,
    key_variable: str | None,
    *,
    scenario: Scenario,
    model: str | None,
    node: str | None,
    via: str | None,
) -> UrlOptions | None:
    """The options of a run without a mesh; ``None`` without ``--url``. The other arguments are options that do not all
    fit to it. Raises UsageError."""
    from gpumesh.bench.load.http.client_apis import CHOSEN_BY_PERSON, ClientApi
    from gpumesh.bench.url_target import SCENARIOS, UrlTarget

    if url is None:
        for option, value in (("--api", api), ("--key-env", key_variable)):
            if value is not None:
                raise UsageError(f"{option} is for --url only", hint="a node's API and key are in mesh.yaml")
        return None
    for option, value in (("--node", node), ("--via", via)):
        if value is not None:
            raise UsageError(f"{option} does not fit to --url, which measures a server of no mesh")
    if scenario not in SCENARIOS:
        raise UsageError(f"--url cannot be measured by {scenario}", hint=f"one of: {', '.join(SCENARIOS)}")
    if model is None:
        raise UsageError("--url needs a model", hint="add -m MODEL")
    names = [choice.value for choice in CHOSEN_BY_PERSON]
    if api not in names:
        problem = "needs --api" if api is None else f"--api {api!r} is unknown"
        raise UsageError(f"--url {problem}" if api is None else problem, hint=f"one of: {', '.join(names)}")
    return UrlOptions(UrlTarget(url, ClientApi(api)), ClientApi(api), key_variable)
