"""Which routes the requests of a batch may be sent to. Pure."""

from __future__ import annotations

from gpumesh.gateway.model_requests import MODEL_ROUTES, ClientApi, find_model_route, only_uses_model

ENDPOINT_RULE = "it begins with /v1/, uses a model, changes nothing and takes JSON, as /v1/chat/completions"
_FORM_PREFIX = "/v1/audio/"  # these routes take a form, which no line of a file can hold


def is_batch_endpoint(path: str) -> bool:
    """Whether the requests of a batch may go to this path. A file may come from anywhere: its lines must not reach a
    route that changes the mesh, a model store or a server. Ollama's own routes answer in streams."""
    if path.startswith(_FORM_PREFIX) or not path.startswith("/v1/") or "?" in path:
        return False
    route = MODEL_ROUTES.get(path) or find_model_route("POST", path)
    return route is not None and route.api is not ClientApi.OLLAMA and only_uses_model(route, path)
