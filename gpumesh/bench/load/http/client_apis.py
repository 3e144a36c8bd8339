"""The APIs in which the load generator asks for answers: how a request is built, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from gpumesh.backends.base import ChatRequest, Dialect, FrameReader, HttpCall
from gpumesh.backends.dialects import DIALECTS
from gpumesh.backends.error_text import error_text
from gpumesh.bench.load.http.anthropic_api import AnthropicEventReader, build_messages_call


class ClientApi(StrEnum):
    """An API of `bench run --api`, or the API of one kind of server."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    LLAMACPP = "llamacpp"
    VLLM = "vllm"


CHOSEN_BY_PERSON = (ClientApi.OLLAMA, ClientApi.OPENAI, ClientApi.ANTHROPIC)
"""The APIs that a person may name. The others are OpenAI's with more options, for servers whose kind is known."""


@dataclass(frozen=True, slots=True)
class ApiFunctions:
    """What the load generator needs to know of an API. ``key_header`` is the header of the API key, with a place for
    the key."""

    build_call: Callable[[ChatRequest], HttpCall]
    create_reader: Callable[[], FrameReader]
    error_text: Callable[[int, bytes], str]
    key_header: tuple[str, str] = ("Authorization", "Bearer {}")

    def key_headers(self, key: str | None) -> tuple[tuple[str, str], ...]:
        """The header of this key; none without a key."""
        if key is None:
            return ()
        name, value = self.key_header
        return ((name, value.format(key)),)


def _functions_of_dialect(dialect: Dialect) -> ApiFunctions:
    """The functions of the API that a kind of server has."""
    return ApiFunctions(dialect.build_chat_call, lambda: dialect.create_reader(stream=True), dialect.error_text)


# The API of a kind of server has the kind's name. Anthropic's is the only one that is no kind of server.
_APIS_OF_KINDS = {ClientApi(kind.value): _functions_of_dialect(dialect) for kind, dialect in DIALECTS.items()}
API_FUNCTIONS: Mapping[ClientApi, ApiFunctions] = MappingProxyType(
    {
        **_APIS_OF_KINDS,
        ClientApi.ANTHROPIC: ApiFunctions(
            build_messages_call, AnthropicEventReader, error_text, key_header=("x-api-key", "{}")
        ),
    }
)


def api_of_kind(kind: str) -> ClientApi:
    """The API in which a server of this kind is asked; OpenAI's if the kind is not known yet."""
    try:
        return ClientApi(kind)
    except ValueError:
        return ClientApi.OPENAI


def common_api(kinds: frozenset[str]) -> ClientApi:
    """The API that servers of all these kinds have: their own if they are of one kind, else OpenAI's."""
    if len(kinds) == 1:
        (kind,) = kinds
        return api_of_kind(kind)
    return ClientApi.OPENAI
