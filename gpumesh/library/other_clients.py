"""Clients of the packages ``openai`` and ``ollama``, set to a gateway."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import httpx

from gpumesh.errors import GPUMeshError
from gpumesh.library.gateway_link import GatewayAddress
from gpumesh.library.mesh_access import find_file, running_address
from gpumesh.text.quoting import paste_command

if TYPE_CHECKING:
    import ollama
    import openai

_NO_KEY = "gpumesh"  # OpenAI's package wants some key


@contextmanager
def _needed(package: str) -> Generator[None]:
    """Raises GPUMeshError with the command that installs the package if it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise GPUMeshError(
            f"the Python package {package} is not installed",
            hint=paste_command("{PYTHON} -m pip install {PACKAGE}", PYTHON=sys.executable, PACKAGE=package),
        ) from error


def make_openai(address: GatewayAddress, settings: dict[str, Any]) -> openai.OpenAI:
    with _needed("openai"):
        import openai
    http = httpx.Client(**address.sync_client_settings())
    return openai.OpenAI(**{**_openai_settings(address), "http_client": http, **settings})


def make_async_openai(address: GatewayAddress, settings: dict[str, Any]) -> openai.AsyncOpenAI:
    with _needed("openai"):
        import openai
    http = httpx.AsyncClient(**address.client_settings())
    return openai.AsyncOpenAI(**{**_openai_settings(address), "http_client": http, **settings})


def make_ollama(address: GatewayAddress, settings: dict[str, Any]) -> ollama.Client:
    with _needed("ollama"):
        import ollama
    return ollama.Client(**{**_ollama_settings(address), **address.sync_client_settings(), **settings})


def make_async_ollama(address: GatewayAddress, settings: dict[str, Any]) -> ollama.AsyncClient:
    with _needed("ollama"):
        import ollama
    return ollama.AsyncClient(**{**_ollama_settings(address), **address.client_settings(), **settings})


def _openai_settings(address: GatewayAddress) -> dict[str, Any]:
    return {"base_url": f"{address.base_url}/v1", "api_key": address.api_key or _NO_KEY}


def _ollama_settings(address: GatewayAddress) -> dict[str, Any]:
    return {"host": address.base_url, "headers": dict(address.authorization)}


@overload
def openai_client(
    config: str | Path | None = None,
    *,
    api_key: str | None = None,
    asynchronous: Literal[False] = False,
    **settings: Any,
) -> openai.OpenAI: ...
@overload
def openai_client(
    config: str | Path | None = None, *, api_key: str | None = None, asynchronous: Literal[True], **settings: Any
) -> openai.AsyncOpenAI: ...
def openai_client(
    config: str | Path | None = None, *, api_key: str | None = None, asynchronous: bool = False, **settings: Any
) -> Any:
    """An ``openai.OpenAI`` (``asynchronous``: an ``openai.AsyncOpenAI``) set to the running mesh of a mesh.yaml.
    ``settings`` are more arguments of it.

    Raises MeshNotRunning if no mesh runs, ConfigError and UsageError for the file or the key, and GPUMeshError with the
    command that installs the package if it is missing."""
    address = running_address(find_file(config), api_key)
    return (make_async_openai if asynchronous else make_openai)(address, settings)


@overload
def ollama_client(
    config: str | Path | None = None,
    *,
    api_key: str | None = None,
    asynchronous: Literal[False] = False,
    **settings: Any,
) -> ollama.Client: ...
@overload
def ollama_client(
    config: str | Path | None = None, *, api_key: str | None = None, asynchronous: Literal[True], **settings: Any
) -> ollama.AsyncClient: ...
def ollama_client(
    config: str | Path | None = None, *, api_key: str | None = None, asynchronous: bool = False, **settings: Any
) -> Any:
    """An ``ollama.Client`` (``asynchronous``: an ``ollama.AsyncClient``). As ``openai_client``."""
    address = running_address(find_file(config), api_key)
    return (make_async_ollama if asynchronous else make_ollama)(address, settings)
