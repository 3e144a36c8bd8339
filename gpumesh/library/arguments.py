"""Checks what a program passes to ``chat``, ``generate`` and ``embed``, and keeps it as an ``Ask`` or as headers.

Wrong arguments are a TypeError or a ValueError that says what was expected, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from gpumesh.library.messages import Message
from gpumesh.topology import Priority

MAX_TIMEOUT_S = 86400.0  # a day, as in the gateway

Format: TypeAlias = str | Mapping[str, Any] | type[Any]
"""``"json"``, a JSON schema, or a class with ``model_json_schema`` (pydantic)."""


@dataclass(frozen=True, slots=True)
class Steering:
    """Where and how soon a request is answered: the values of the gateway's request headers."""

    priority: Priority = Priority.NORMAL
    node: str | None = None
    session: str | None = None
    timeout_s: float | None = None
    resume: bool = True

    def headers(self) -> dict[str, str]:
        """The gateway's request headers with these values."""
        headers = {"X-GPUMesh-Priority": self.priority.value}
        if self.node is not None:
            headers["X-GPUMesh-Node"] = self.node
        if self.session is not None:
            headers["X-GPUMesh-Session"] = self.session
        if self.timeout_s is not None:
            headers["X-GPUMesh-Timeout"] = f"{self.timeout_s:g}"
        if not self.resume:
            headers["X-GPUMesh-Resume"] = "off"
        return headers


@dataclass(frozen=True, slots=True)
class Ask:
    """What a model is asked. ``format`` is ``"json"`` or a JSON schema. ``is_chat`` is false for ``generate``."""

    messages: tuple[Message, ...]
    model: str | None = None
    is_chat: bool = True
    tools: tuple[Mapping[str, Any], ...] = ()
    format: str | Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    think: bool | str | None = None
    keep_alive: str | float | None = None


def read_steering(
    *,
    priority: object = Priority.NORMAL,
    node: object = None,
    session: object = None,
    timeout: object = None,
    resume: object = True,
) -> Steering:
    """Checks the arguments that say where and how soon a request is answered. ``timeout`` is in seconds. Raises
    TypeError and ValueError."""
    try:
        checked_priority = Priority(priority)  # type: ignore[arg-type]  # raises ValueError for all that is no text
    except ValueError:
        raise ValueError(f"priority is one of {', '.join(Priority)}, not {priority!r}") from None
    checked_timeout = None
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float):
            raise TypeError(f"timeout is a number of seconds, not {type(timeout).__name__}")
        if not 0 < timeout <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout is more than 0 and at most {MAX_TIMEOUT_S:.0f} seconds, not {timeout!r}")
        checked_timeout = float(timeout)
    if not isinstance(resume, bool):
        raise TypeError(f"resume is True or False, not {type(resume).__name__}")
    return Steering(
        checked_priority, _read_header("node", node), _read_header("session", session), checked_timeout, resume
    )


def _read_header(name: str, value: object) -> str | None:
    """A text that is sent as a header: one line of ASCII."""
    if value is None:
        return None
    text = read_text(name, value)
    if not text.isascii() or not text.isprintable() or not text:
        raise ValueError(f"{name} is one line of ASCII characters, not {text!r}")
    return text


def read_text(name: str, value: object) -> str:
    """Returns the value if it is a text; otherwise raises TypeError with the argument's ``name``."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a text, not {type(value).__name__}")
    return value


def read_model(model: object) -> str | None:
    """The model's name; ``None`` stands for the default model of mesh.yaml."""
    if model is None:
        return None
    text = read_text("model", model)
    if not text.strip():
        raise ValueError("model is empty; None stands for the default model of mesh.yaml")
    return text


def read_options(options: object) -> Mapping[str, Any]:
    """The model's options, with Ollama's names."""
    if options is None:
        return MappingProxyType({})
    if not isinstance(options, Mapping):
        raise TypeError(f'options are a dictionary such as {{"temperature": 0}}, not {type(options).__name__}')
    for key in options:
        read_text("the name of an option", key)
    return dict(options)


def read_format(form: object) -> str | Mapping[str, Any] | None:
    """The form of the answer: ``"json"``, or a JSON schema, also of a pydantic model."""
    if form is None or isinstance(form, Mapping) or form == "json":
        return form
    schema = getattr(form, "model_json_schema", None)
    if callable(schema):
        return dict(schema())
    if isinstance(form, str):
        raise ValueError(f'format is "json" or a JSON schema, not {form!r}')  # noqa: TRY004 - a text may be right
    raise TypeError(f'format is "json", a JSON schema or a pydantic model, not {type(form).__name__}')


def read_think(think: object) -> bool | str | None:
    if think is not None and not isinstance(think, bool | str):
        raise TypeError(f'think is True, False or an effort such as "high", not {type(think).__name__}')
    return think


def read_keep_alive(value: object) -> str | float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise TypeError(f'keep_alive is a number of seconds or a text such as "10m", not {type(value).__name__}')
    return value


def read_input(texts: object) -> str | list[str]:
    """What is to become vectors: a text or several."""
    if isinstance(texts, str):
        return texts
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"input is a text or a list of texts, not {type(texts).__name__}")
    read = [read_text(f"input[{number}]", text) for number, text in enumerate(texts)]
    if not read:
        raise ValueError("input is empty; it is a text or a list of texts")
    return read
