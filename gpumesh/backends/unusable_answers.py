"""Errors for answers to probes that cannot be used, with hints: refused, overloaded, loading, broken, other server."""

from __future__ import annotations

from typing import Any

from gpumesh.backends import error_text, model_list, safe_json
from gpumesh.backends.error_meanings import is_busy_status, is_proxy_status
from gpumesh.errors import ProbeError
from gpumesh.text.printable import printable

MAX_MODELS = model_list.MAX_MODELS


def raise_for_status(status: int, body: bytes) -> None:
    """Raises ProbeError for a status that refuses us, or that asks us to wait. The meaning of any other status depends
    on the kind of server."""
    if status in (401, 403):
        raise key_refused_error(status, body)
    if is_busy_status(status) or status >= 500:
        raise unavailable_error(status, body)


def key_refused_error(status: int, body: bytes) -> ProbeError:
    """The error for status 401 and 403. Ollama's 403 without a body is another error: ``host-refused``."""
    message = error_text.error_text(status, body)
    hint = "set `backend.api_key_env` to the variable that holds its key"
    if error_text.is_web_page(body):
        hint = f"a proxy stands before it: point `backend.port` or `backend.url` at the server itself, or {hint}"
    return ProbeError(f"the server refuses us: {message}", finding_code="key-refused", hint=hint)


def unavailable_error(status: int, body: bytes) -> ProbeError:
    """The error for a status of 500 and above, and for 429."""
    message = error_text.error_text(status, body)
    if is_busy_status(status):
        hint = "it has too much to do, or a limit of requests: raise that, if it stays so; it is asked again by itself"
    elif error_text.is_web_page(body) or is_proxy_status(status):
        hint = "a proxy answers, and the server behind it does not: start that, or point `backend.url` at it directly"
    elif status == 503 and "loading" in message.lower():
        hint = "wait until it has loaded its model; it is asked again by itself"
    else:
        hint = "see the server's log on its host (`journalctl -u ollama`, `docker logs`), and restart it"
    return ProbeError(f"the server says {message}", finding_code="backend-down", hint=hint)


OTHER_KIND_HINT = (
    "point `backend.port` or `backend.url` at the server itself, or leave out `backend.kind`: it is found by asking"
)


def other_server_error(label: str, path: str, status: int, body: bytes, *, hint: str = OTHER_KIND_HINT) -> ProbeError:
    """The error for an answer that no server of the kind ``label`` gives to a request for ``path``."""
    if error_text.is_web_page(body):
        description = error_text.describe_web_page(body)
    else:
        description = f"HTTP {status} {printable(body, 60)!r}" if body.strip() else f"HTTP {status}"
    message = f"the port answers, but not as {label}: {path} gave {description}"
    return ProbeError(message, finding_code="wrong-server", hint=hint)


def broken_json_error(body: bytes, path: str) -> ProbeError | None:
    """The error for an answer to ``path`` that begins as a JSON object, but is broken or holds too many values;
    ``None`` for any other answer."""
    if not body.lstrip().startswith(b"{"):
        return None
    if safe_json.too_many_values(body):
        return too_many_models_error(f"{path} gave more than {safe_json.REPORT_VALUES} values")
    if safe_json.parse_report(body) is not None:
        return None
    return broken_answer_error(f"{path} gave what is no whole JSON: {printable(body, 60)!r}")


def broken_answer_error(message: str) -> ProbeError:
    """The error for an answer that is not whole, or is no JSON."""
    hint = "see the server's log on its host, and restart it; or a proxy on the way cuts long answers: go around it"
    return ProbeError(message, finding_code="answer-broken", hint=hint)


def long_list_error(models: Any) -> ProbeError | None:
    """The error for a list of more than ``MAX_MODELS`` models; ``None`` for any other value. Such a node gets no
    inventory at all: with a part of the list, the mesh would report that the last models are missing."""
    if not isinstance(models, list) or len(models) <= MAX_MODELS:
        return None
    return too_many_models_error(f"it lists {len(models)} models")


def too_many_models_error(message: str) -> ProbeError:
    """The error for a server that lists more models than are read."""
    hint = "remove what nobody uses (`ollama rm`), or let a server of its own offer those that you need"
    return ProbeError(f"{message}; {MAX_MODELS} are read at most", finding_code="models-too-many", hint=hint)
